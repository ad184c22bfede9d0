"""Carries decisions out: directory, channels, and the one loop pick -> lease -> call -> outcome -> next."""
