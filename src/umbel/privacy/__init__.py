"""Differential privacy: what a run tells of one client, or of one example, is bounded and counted."""
