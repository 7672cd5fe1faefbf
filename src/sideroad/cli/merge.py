"""stub"""
SUMMARY = "Write a model with adapters merged in."
EXAMPLES = ()


def run() -> None:
    """stub"""
