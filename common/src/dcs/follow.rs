//! A view that is kept up to date: read everything, watch from there, read again on any doubt.

use std::sync::Arc;

use crate::{ClusterView, Instant};

/// What is known of the cluster, and since when it is unconfirmed.
#[derive(Debug, Clone, PartialEq)]
pub struct Knowledge {
    /// The last view; `None` until the first reading succeeded.
    pub view: Option<Arc<ClusterView>>,
    /// When the DCS last confirmed that nothing is missing from `view` (an event, an answered probe, a reading).
    pub confirmed_at: Option<Instant>,
    /// Why there is doubt now, in words; `None` while the watch is alive.
    pub trouble: Option<String>,
}
