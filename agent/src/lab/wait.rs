//! Waiting with a bound: never "sleep and hope".

use std::fmt::Display;
use std::time::Duration;

use anyhow::{Result, bail};
use trunkline_common::{Clock, SystemClock};

/// How often a condition is looked at.
const PACE: Duration = Duration::from_millis(20);

/// Asks `probe` until it succeeds; its error says why not yet.
///
/// # Errors
/// It has not succeeded within `limit`: `what` was waited for, and the last error of `probe`.
pub async fn until<T>(what: impl Display, limit: Duration, mut probe: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let clock = SystemClock;
    let deadline = clock.now() + limit;
    loop {
        // The probe itself may hang where a frozen process is asked.
        let answer = tokio::time::timeout(limit, probe()).await;
        let why_not = match answer {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => "no answer".to_owned(),
        };
        if clock.now() >= deadline {
            bail!("waited {limit:?} for {what}: {why_not}");
        }
        tokio::time::sleep(PACE).await;
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[tokio::test]
    async fn returns_the_first_success_and_names_what_did_not_happen() {
        let mut turns = 0;
        let found = until("the third turn", Duration::from_secs(5), async || {
            turns += 1;
            if turns == 3 { Ok(turns) } else { Err(anyhow!("only {turns}")) }
        });
        assert_eq!(found.await.unwrap(), 3);

        let never = until("a miracle", Duration::from_millis(50), async || Err::<(), _>(anyhow!("not today"))).await;
        assert_eq!(never.unwrap_err().to_string(), "waited 50ms for a miracle: not today");
    }
}
