"""What an iteration is (loop.py), and what differs between stages."""
