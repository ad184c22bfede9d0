"""Who is alive and what they are."""
