"""What one rank does, holds and sends as the world grows, counted without the ranks."""
