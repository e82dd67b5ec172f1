//! Checkers, oracles and fault injection for tests.
