"""Makes the micro model: a Qwen3 of two million parameters that can read a board and experience, and knows no game.

Nothing here is needed to run oel-ray; the result lies in the package as `model: micro`. See README.md.
"""
