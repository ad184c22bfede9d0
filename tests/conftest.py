"""Fixtures that several folders share, and how property tests run."""

from hypothesis import settings

pytest_plugins = ["tests.kit.llm"]
# A loaded machine takes its time; what a step may take is measured where it is the subject.
settings.register_profile("house", deadline=None)
settings.load_profile("house")
