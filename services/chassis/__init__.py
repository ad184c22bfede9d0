"""What every process of a mesh shares."""
