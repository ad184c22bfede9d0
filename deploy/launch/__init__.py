"""Starting a fleet's processes on this host, and keeping them running."""
