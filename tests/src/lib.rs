//! Whole-system tests of nibble; see `tests/`.
