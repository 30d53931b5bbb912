"""Generated from proto/mlxd/v1 by scripts/generate.py; do not edit."""
