"""Build, cross-link, bundle and run compiled models."""
