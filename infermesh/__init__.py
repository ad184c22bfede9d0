"""infermesh: a mixed fleet of model servers behind one address."""

__version__ = "0.1.0"
