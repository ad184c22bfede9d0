"""From a completed fleet to files: Docker Compose, Kubernetes. Pure: text out, nothing is written or started here."""
