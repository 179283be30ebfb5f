"""R2, connectivity kept and spectrum of reconstructed scans, as an `evaluate` module."""
