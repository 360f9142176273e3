"""What ends a simulated move that breaks a rule."""


class Violation(Exception):
    """An invariant does not hold; the text says which and how."""
