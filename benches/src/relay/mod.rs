//! What a proxy costs: throughput, CPU, memory and latency through ours and through others, in front of the same server.
//!
//! Rounds are interleaved: each figure is taken of every way, one after the other, and then again, so that whatever else the
//! machine does hits all of them. What counts are ratios of medians.

pub mod client;
pub mod figures;
pub mod peer;
pub mod process;
pub mod report;
pub mod site;
