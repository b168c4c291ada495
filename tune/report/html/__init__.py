"""The report as one HTML page with figures."""
