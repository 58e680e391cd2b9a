"""The tests of tests/test_cuda.py, by part."""
