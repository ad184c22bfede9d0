"""The core: plain functions and values (law 2). No I/O, no await, no clock, no chance, no logging, no telemetry."""
