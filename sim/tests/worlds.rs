//! A fixed set of worlds, the scenarios that once failed, and that a world is the same each time.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use trunkline_common::{Clock, SystemClock};
use trunkline_sim::scenario::Scenario;
use trunkline_sim::world;

/// Enough to find a gross mistake in less than three minutes of an unoptimised build; `make sim` runs any number.
const SEEDS: u64 = 200;

/// No world is begun later than that: a machine that is slow, or busy, runs fewer.
const BEGUN_WITHIN: Duration = Duration::from_secs(150);

#[test]
fn nothing_goes_wrong_in_a_fixed_set_of_worlds() {
    let (next, ran, failed) = (AtomicU64::new(1), AtomicU64::new(0), Mutex::new(Vec::new()));
    let until = SystemClock.now() + BEGUN_WITHIN;
    let work = || {
        while SystemClock.now() < until {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed > SEEDS {
                return;
            }
            ran.fetch_add(1, Ordering::Relaxed);
            let report = world::run(&Scenario::draw(seed));
            if !report.violations.is_empty() {
                failed.lock().push((seed, report.violations));
            }
        }
    };
    std::thread::scope(|scope| {
        (0..2).for_each(|_| {
            scope.spawn(work);
        });
    });
    match ran.into_inner() {
        SEEDS => println!("{SEEDS} worlds ran"),
        ran => println!("SKIPPED: {} of {SEEDS} worlds: {ran} took {BEGUN_WITHIN:?} here", SEEDS - ran),
    }
    let failed = failed.into_inner();
    assert!(failed.is_empty(), "replay with `make sim ARGS='--seed N'`: {failed:#?}");
}

#[test]
fn what_once_failed_is_mended() {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
    for entry in std::fs::read_dir(&kept).unwrap().flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap();
        let scenario: Scenario = serde_json::from_str(&text).unwrap();
        let report = world::run(&scenario);
        assert!(report.violations.is_empty(), "{}: {:#?}", entry.path().display(), report.violations);
    }
}

#[test]
fn one_seed_is_one_world() {
    for seed in [3, 8, 21] {
        let scenario = Scenario::draw(seed);
        let (first, second) = (world::run(&scenario), world::run(&scenario));
        assert_eq!(first, second, "seed {seed}");
        assert_ne!(first.fingerprint, world::run(&Scenario { seed: seed + 1000, ..scenario }).fingerprint);
    }
}

#[test]
fn a_scenario_survives_being_written_down() {
    for seed in 0..200 {
        let scenario = Scenario::draw(seed);
        let text = serde_json::to_string(&scenario).unwrap();
        assert_eq!(serde_json::from_str::<Scenario>(&text).unwrap(), scenario);
    }
}

#[test]
fn what_is_broken_on_purpose_still_fits_the_product() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for entry in std::fs::read_dir(root.join("sim/mutants")).unwrap().flatten() {
        let patch = std::fs::File::open(entry.path()).unwrap();
        let text = std::fs::read_to_string(entry.path()).unwrap();
        assert!(text.contains("\nNoticed: "), "{}: it has to say what must come of it", entry.path().display());
        let fits = Command::new("patch")
            .args(["--dry-run", "--force", "--strip=1"])
            .current_dir(&root)
            .stdin(patch)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&fits.stdout);
        assert!(fits.status.success(), "{}: {said}", entry.path().display());
    }
}
