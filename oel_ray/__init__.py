"""oel-ray: Online Experiential Learning (arXiv 2603.16856) on Ray.

Importing this package loads neither torch nor vLLM nor Ray.
"""

__version__ = "0.1.0"
