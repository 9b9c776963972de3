"""``python -m jaxkv.generate``: a file of prompts in, a file of answers out.

``__main__`` the command line; ``lines`` the input as a grain pipeline; ``work`` one line from its bytes to its record;
``journal`` the output file, which is also the memory of what is done; ``runner`` the loop around the engine.
"""
