"""Generated from proto/mlxd/v1 by scripts/generate_stubs.py; do not edit."""
