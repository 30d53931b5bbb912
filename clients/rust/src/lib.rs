//! Client for mlxd.
