//! Files of a data directory: what stands in `settings` as text gets written here, atomically and only where it changed.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use trunkline_config::PostgresConfig;

use super::settings::{self, Managed};
use super::{PgError, Upstream, conninfo, query};

/// What a data directory looks like from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataDir {
    /// Not there, or nothing in it.
    Empty,
    /// A copy that was cut off: it must never be started, and nothing is lost with it.
    Unfinished,
    /// There, and ours.
    Present,
    /// There, but PostgreSQL would refuse it: whose it is or its mode.
    Refused(String),
}

/// Looks at the data directory. `lost+found` and dot files of a mount point don't count, as in Patroni.
pub fn look(data_dir: &Path) -> DataDir {
    let Ok(metadata) = fs::metadata(data_dir) else { return DataDir::Empty };
    let me = rustix::process::geteuid().as_raw();
    if metadata.uid() != me {
        return DataDir::Refused(format!("{} belongs to uid {}, not to {me}", data_dir.display(), metadata.uid()));
    }
    let entries = match fs::read_dir(data_dir) {
        Ok(entries) => entries,
        Err(error) => return DataDir::Refused(format!("{}: {error}", data_dir.display())),
    };
    if !entries.flatten().any(|entry| counts(&entry.file_name().to_string_lossy())) {
        return DataDir::Empty;
    }
    if is_unfinished(Unfinished::Copy, data_dir) || is_unfinished_base_backup(data_dir) {
        return DataDir::Unfinished;
    }
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o027 != 0 {
        return DataDir::Refused(format!(
            "{} has mode {mode:04o}; PostgreSQL wants 0700 or 0750 (u=rwx,g=rx)",
            data_dir.display()
        ));
    }
    DataDir::Present
}

/// pg_basebackup sends `backup_label` first and `global/pg_control` last; before the first of them there is only the WAL
/// that it streams beside.
fn is_unfinished_base_backup(data_dir: &Path) -> bool {
    let only_wal = || {
        let entries = fs::read_dir(data_dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name()).all(|name| name == "pg_wal" || !counts(&name.to_string_lossy()))
    };
    !data_dir.join("global/pg_control").exists() && (data_dir.join("backup_label").exists() || only_wal())
}

fn counts(name: &str) -> bool {
    !name.starts_with('.') && name != "lost+found"
}

/// Writes `postgresql.conf`, `pg_hba.conf`, `pg_ident.conf` and cleans `postgresql.auto.conf`; true if any of them changed.
///
/// Nothing is synced to disk: every start writes the files anew, so a crash of the host costs nothing.
pub fn write(config: &PostgresConfig, managed: &Managed, version: u32) -> Result<bool, PgError> {
    let conf = conf_file(config);
    // The user's own file stays as it is meanwhile.
    let hba = if managed.open { open_hba(config) } else { config.config_dir.join("pg_hba.conf") };
    let ident = config.config_dir.join("pg_ident.conf");
    let base = base_file(config, &conf)?;
    let text = settings::postgresql_conf(config, managed, &base, &hba, &ident, version);
    let mut changed = replace(&conf, &text).map_err(|error| unwritable(&conf, &error))?;
    let (mut hba_lines, ident_lines) = (config.pg_hba_for(managed.role), config.pg_ident_for(managed.role));
    if managed.open {
        hba_lines = Some(settings::open_hba(query::user(config)));
    }
    for (file, lines, parameter) in [(&hba, hba_lines, "hba_file"), (&ident, ident_lines, "ident_file")] {
        if config.parameters.contains_key(parameter) && !(managed.open && file == &hba) {
            continue;
        }
        let Some(lines) = lines else {
            changed |= seed(config, file)?;
            continue;
        };
        changed |= replace(file, &settings::lines(&lines)).map_err(|error| unwritable(file, &error))?;
    }
    let auto = config.data_dir.join("postgresql.auto.conf");
    if managed.keep_recovery {
        return Ok(changed);
    }
    if let Some(stripped) = fs::read_to_string(&auto).ok().and_then(|text| settings::without_recovery_settings(&text)) {
        changed |= replace(&auto, &stripped).map_err(|error| unwritable(&auto, &error))?;
    }
    Ok(changed)
}

/// Makes the data directory start as a standby, or not.
pub fn set_standby_signal(data_dir: &Path, standby: bool) -> Result<(), PgError> {
    let signal = data_dir.join("standby.signal");
    let result = match standby {
        true => replace(&signal, "").map(drop),
        false => remove(&signal),
    };
    result.map_err(|error| unwritable(&signal, &error))?;
    // It would recover to a target and promote by itself.
    let recovery = data_dir.join("recovery.signal");
    remove(&recovery).map_err(|error| unwritable(&recovery, &error))
}

/// The access rules of a restored cluster that is not finished.
fn open_hba(config: &PostgresConfig) -> PathBuf {
    config.config_dir.join("pg_hba.restoring.conf")
}

/// They are over.
pub fn remove_open_hba(config: &PostgresConfig) -> Result<(), PgError> {
    let path = open_hba(config);
    remove(&path).map_err(|error| unwritable(&path, &error))
}

/// Makes the data directory recover by the recovery settings, and then take writes.
pub fn set_recovery_signal(data_dir: &Path) -> Result<(), PgError> {
    set_standby_signal(data_dir, false)?;
    let signal = data_dir.join("recovery.signal");
    replace(&signal, "").map(drop).map_err(|error| unwritable(&signal, &error))
}

/// Removes an empty directory: programs that copy one may insist on making it themselves. A mount point stays.
pub fn remove_empty(dir: &Path) {
    let _ = fs::remove_dir(dir);
}

/// Writes the password file for connections to `upstream`; true if it changed. The standby's WAL receiver reads it at
/// every connect, so the replication user is always in it.
pub fn write_pgpass(config: &PostgresConfig, upstream: &Upstream) -> Result<bool, PgError> {
    let text = conninfo::pgpass(upstream, &[&config.replication, &config.rewind, &config.superuser]);
    if text.is_empty() && !config.pgpass.exists() {
        return Ok(false);
    }
    replace(&config.pgpass, &text).map_err(|error| unwritable(&config.pgpass, &error))
}

/// What is in a data directory's `postgresql.conf` of the settings managed here.
pub fn managed(config: &PostgresConfig) -> Managed {
    let text = fs::read_to_string(conf_file(config)).unwrap_or_default();
    settings::managed_in(&text)
}

/// The main configuration file.
pub fn conf_file(config: &PostgresConfig) -> PathBuf {
    config.config_dir.join(format!("{}.conf", config.config_base_name()))
}

/// Appends lines to a file.
pub fn append(path: &Path, lines: &[String]) -> Result<(), PgError> {
    let append = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new().append(true).open(path)?;
        file.write_all(lines.iter().map(|line| format!("{line}\n")).collect::<String>().as_bytes())
    };
    append().map_err(|error| unwritable(path, &error))
}

/// Empties a data directory, with what its tablespaces and a `pg_wal` elsewhere hold. The directories themselves stay:
/// they may be mount points.
pub fn remove_data(data_dir: &Path) -> Result<(), PgError> {
    // A guard against a configuration error, not against malice: "/", "/var" are nobody's data directory.
    if data_dir.components().count() < 3 || !data_dir.is_absolute() {
        return Err(PgError::Unusable(format!("{} is not a path to remove data from", data_dir.display())));
    }
    for target in outside(data_dir) {
        clear(&target).map_err(|error| unwritable(&target, &error))?;
    }
    clear(data_dir).map_err(|error| unwritable(data_dir, &error))?;
    end(Unfinished::Copy, data_dir)
}

/// What is said beside a data directory (pg_rewind removes what it does not know inside) while it is neither the old one
/// nor the new: whoever comes after a crash must not take it for either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfinished {
    /// pg_rewind is at work on it; it must not be started.
    Rewind,
    /// It belongs to a cluster that is being made, and that nobody has been told of.
    Bootstrap,
    /// A method of the user's own copies into it, in an order that nobody knows.
    Copy,
}

/// Says so, durably.
pub fn begin(what: Unfinished, data_dir: &Path) -> Result<(), PgError> {
    let marker = marker(what, data_dir);
    let write = || {
        let file = fs::File::create(&marker)?;
        file.sync_all()?;
        marker.parent().map_or(Ok(()), |parent| fs::File::open(parent)?.sync_all())
    };
    write().map_err(|error| unwritable(&marker, &error))
}

/// It has come to its end.
pub fn end(what: Unfinished, data_dir: &Path) -> Result<(), PgError> {
    let marker = marker(what, data_dir);
    remove(&marker).map_err(|error| unwritable(&marker, &error))
}

/// The data directory is another one now.
pub fn end_all(data_dir: &Path) -> Result<(), PgError> {
    end(Unfinished::Rewind, data_dir)?;
    end(Unfinished::Copy, data_dir)?;
    end(Unfinished::Bootstrap, data_dir)
}

/// Whether it was cut off.
pub fn is_unfinished(what: Unfinished, data_dir: &Path) -> bool {
    marker(what, data_dir).exists()
}

fn marker(what: Unfinished, data_dir: &Path) -> PathBuf {
    let mut name = data_dir.file_name().unwrap_or_default().to_owned();
    name.push(match what {
        Unfinished::Rewind => ".rewinding",
        Unfinished::Bootstrap => ".bootstrapping",
        Unfinished::Copy => ".copying",
    });
    data_dir.with_file_name(name)
}

/// Renames a data directory to `<name>.failed`, or `.failed.2` and so on, if there is one. Tablespaces and `pg_wal` elsewhere
/// go with it.
pub fn move_aside(data_dir: &Path) -> Result<Option<PathBuf>, PgError> {
    for target in outside(data_dir) {
        rename_aside(&target).map_err(|error| unwritable(&target, &error))?;
    }
    let moved = match rename_aside(data_dir) {
        Ok(moved) => Some(moved),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(unwritable(data_dir, &error)),
    };
    end_all(data_dir)?;
    Ok(moved)
}

/// Makes a directory that only we can read.
pub fn create_private_dir(dir: &Path) -> Result<(), PgError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let create = || fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    create().map_err(|error| PgError::Unusable(format!("{} can't be created: {error}", dir.display())))
}

/// Gives a file this content by writing another and renaming it, readable for its owner only; false if it had it.
pub fn replace(path: &Path, text: &str) -> io::Result<bool> {
    if fs::read(path).is_ok_and(|present| present == text.as_bytes()) {
        return Ok(false);
    }
    // Group access follows the data directory's (initdb --allow-group-access).
    let group = path.parent().and_then(|dir| fs::metadata(dir).ok()).is_some_and(|dir| dir.mode() & 0o777 == 0o750);
    let temporary = path.with_extension("trunkline.tmp");
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    let private = path.file_name().is_some_and(|name| name.to_string_lossy().contains("pgpass"));
    file.set_permissions(fs::Permissions::from_mode(if group && !private { 0o640 } else { 0o600 }))?;
    drop(file);
    fs::rename(&temporary, path)?;
    Ok(true)
}

/// An error about a file.
pub fn unwritable(path: &Path, error: &io::Error) -> PgError {
    PgError::Unusable(format!("{} can't be written: {error}", path.display()))
}

/// The file that `postgresql.conf` includes: the user's, or the original under another name.
fn base_file(config: &PostgresConfig, conf: &Path) -> Result<String, PgError> {
    if let Some(custom) = &config.custom_conf {
        return Ok(custom.to_string_lossy().into_owned());
    }
    let name = format!("{}.base.conf", config.config_base_name());
    let base = config.config_dir.join(&name);
    if base.exists() {
        return Ok(name);
    }
    let original = fs::read_to_string(conf).ok().filter(|text| !settings::is_ours(text));
    // With a configuration directory of its own, initdb's file is still in the data directory.
    let initdbs = || fs::read_to_string(config.data_dir.join("postgresql.conf")).ok().filter(|t| !settings::is_ours(t));
    let text = original.or_else(initdbs).unwrap_or_default();
    replace(&base, &text).map_err(|error| unwritable(&base, &error))?;
    Ok(name)
}

/// With a configuration directory of its own, a file that initdb or a clone left in the data directory is taken over.
fn seed(config: &PostgresConfig, file: &Path) -> Result<bool, PgError> {
    let name = file.file_name().unwrap_or_default();
    let source = config.data_dir.join(name);
    if config.config_dir == config.data_dir || file.exists() || !source.exists() {
        return Ok(false);
    }
    let copy = fs::read_to_string(&source).and_then(|text| replace(file, &text));
    copy.map_err(|error| unwritable(file, &error))
}

/// Where the links of a data directory lead: tablespaces, and a `pg_wal` elsewhere.
fn outside(data_dir: &Path) -> Vec<PathBuf> {
    let spaces = fs::read_dir(data_dir.join("pg_tblspc")).into_iter().flatten().flatten().map(|entry| entry.path());
    let links = spaces.chain([data_dir.join("pg_wal")]).filter(|path| path.is_symlink());
    links.filter_map(|link| fs::canonicalize(link).ok()).filter(|target| target.components().count() >= 3).collect()
}

fn clear(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        // lost+found belongs to the file system and to root.
        if entry.file_name() == "lost+found" {
            continue;
        }
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

fn rename_aside(dir: &Path) -> io::Result<PathBuf> {
    let name = |n: u32| match n {
        1 => format!("{}.failed", dir.display()),
        n => format!("{}.failed.{n}", dir.display()),
    };
    let free = (1..1000).map(|n| PathBuf::from(name(n))).find(|path| !path.exists());
    let target = free.ok_or_else(|| io::Error::other("too many failed data directories beside it"))?;
    fs::rename(dir, &target)?;
    Ok(target)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::config;
    use super::*;

    fn private_dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temp dir");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).expect("mode");
        dir
    }

    #[test]
    fn a_data_directory_is_judged_from_outside() {
        let dir = private_dir();
        assert_eq!(look(&dir.path().join("absent")), DataDir::Empty);
        fs::create_dir(dir.path().join("lost+found")).expect("dir");
        assert_eq!(look(dir.path()), DataDir::Empty);
        fs::write(dir.path().join("PG_VERSION"), "15").expect("file");
        assert_eq!(look(dir.path()), DataDir::Present);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("mode");
        assert!(matches!(look(dir.path()), DataDir::Refused(why) if why.contains("0755")));
    }

    #[test]
    fn a_copy_that_was_cut_off_is_known() {
        let dir = private_dir();
        fs::create_dir(dir.path().join("pg_wal")).expect("dir");
        assert_eq!(look(dir.path()), DataDir::Unfinished);
        fs::write(dir.path().join("backup_label"), "START WAL LOCATION: 0/2000028\n").expect("file");
        fs::write(dir.path().join("PG_VERSION"), "15").expect("file");
        assert_eq!(look(dir.path()), DataDir::Unfinished);
        fs::create_dir(dir.path().join("global")).expect("dir");
        fs::write(dir.path().join("global/pg_control"), "").expect("file");
        assert_eq!(look(dir.path()), DataDir::Present, "the copy is complete");
        fs::remove_file(dir.path().join("backup_label")).expect("file");
        fs::remove_file(dir.path().join("global/pg_control")).expect("file");
        assert_eq!(look(dir.path()), DataDir::Present, "this was not a copy: for a person to look at");
    }

    #[test]
    fn the_original_is_kept_and_files_are_written_once() {
        let dir = private_dir();
        let mut config = config(dir.path(), 5432);
        config.pg_hba = Some(vec!["local all all trust".into()]);
        fs::write(dir.path().join("postgresql.conf"), "shared_buffers = 1MB\n").expect("original");
        fs::write(dir.path().join("postgresql.auto.conf"), "primary_conninfo = 'x'\n").expect("auto");
        assert_eq!(write(&config, &Managed::default(), 15), Ok(true));
        assert_eq!(write(&config, &Managed::default(), 15), Ok(false));
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).expect(name);
        assert_eq!(read("postgresql.base.conf"), "shared_buffers = 1MB\n");
        assert_eq!(read("postgresql.auto.conf"), "");
        assert!(read("pg_hba.conf").ends_with("local all all trust\n"));
        assert_eq!(fs::metadata(dir.path().join("postgresql.conf")).expect("conf").mode() & 0o777, 0o600);
    }

    #[test]
    fn removal_follows_tablespaces_and_moving_aside_keeps_everything() {
        let dir = private_dir();
        let (data, space) = (dir.path().join("data"), dir.path().join("space"));
        for path in [data.join("pg_tblspc"), space.join("PG_15")] {
            fs::create_dir_all(path).expect("dirs");
        }
        std::os::unix::fs::symlink(&space, data.join("pg_tblspc/1")).expect("link");
        remove_data(&data).expect("removed");
        assert_eq!((fs::read_dir(&data).expect("data").count(), fs::read_dir(&space).expect("space").count()), (0, 0));

        assert_eq!(move_aside(&data), Ok(Some(dir.path().join("data.failed"))));
        assert_eq!(move_aside(&data), Ok(None));
        fs::create_dir(&data).expect("again");
        assert_eq!(move_aside(&data), Ok(Some(dir.path().join("data.failed.2"))));
        assert!(remove_data(Path::new("/var")).is_err());
    }
}
