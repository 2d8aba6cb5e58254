//! Reclaim: which segments go.
