"""From a heap of cards to instances: a hardware catalogue, memory and speed arithmetic that shows its working, and the
choice of what runs where. Pure; model files are read by whoever calls (deploy/model_files)."""
