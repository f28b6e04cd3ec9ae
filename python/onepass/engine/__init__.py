"""The step engine: the plan of a parameter list, its tables and states, and the backends."""
