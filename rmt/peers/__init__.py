"""What people use beside mask tuning, on equal footing: one method a file, and `rmt compare` over them.

`names.py` knows the methods and how they are combined; `method.py` says what a method is; `footing.py` what all share.
"""
