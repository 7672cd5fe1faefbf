"""stub"""
SUMMARY = "Show what is inside an adapter."
EXAMPLES = ()


def run() -> None:
    """stub"""
