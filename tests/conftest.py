"""Fixtures that several folders share, and how property tests run."""

import signal

from hypothesis import settings

pytest_plugins = ["tests.kit.llm"]
# A loaded machine takes its time; what a step may take is measured where it is the subject.
settings.register_profile("house", deadline=None)
settings.load_profile("house")
# A shell starts what runs in the background deaf to Ctrl-C, and every child inherits that; tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
