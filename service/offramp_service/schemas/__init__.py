"""Bodies, one module for each door's format, and what they share: reading, controls, OpenAPI.

msgspec reads and writes them: strict (`true` is not a number, `"2"` neither) and several times
faster than a validating framework. What values mean is checked elsewhere; here are types only.
"""
