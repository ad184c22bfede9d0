"""A wind tunnel in virtual time: engines as DESIGN §6 models them, driven by the very router and by its peers. Pure."""
