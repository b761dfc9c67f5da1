//! What happened, for a person: the product's own log lines with the world's time and the process that wrote them.

use std::cell::RefCell;
use std::fmt;
use std::time::Duration;

use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::{FormatEvent, Writer};
use tracing_subscriber::registry::LookupSpan;

thread_local! {
    static WHERE: RefCell<(Duration, String)> = const { RefCell::new((Duration::ZERO, String::new())) };
}

/// From here on, log lines are of this process at this time.
pub fn enter(now: Duration, process: &str) {
    if !tracing::enabled!(tracing::Level::ERROR) {
        return;
    }
    WHERE.with_borrow_mut(|place| {
        place.0 = now;
        place.1.clear();
        place.1.push_str(process);
    });
}

/// Prints everything from `level` on to standard output, until the process ends.
pub fn print(level: tracing::Level) {
    let subscriber =
        tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stdout).event_format(WorldTime);
    // Only fails if it was called before.
    let _ = subscriber.try_init();
}

struct WorldTime;

impl<S, N> FormatEvent<S, N> for WorldTime
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &tracing_subscriber::fmt::FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> fmt::Result {
        WHERE.with_borrow(|(now, process)| {
            write!(writer, "{:>10.4} {process:<9} {:<5} ", now.as_secs_f64(), event.metadata().level())
        })?;
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
