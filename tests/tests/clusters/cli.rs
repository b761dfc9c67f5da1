//! `patronictl` and `trunklinectl`: given the same arguments and the same input about the same cluster, they print the same and end
//! with the same exit code, whichever product runs the cluster.
//!
//! A case is a command line; `$LEADER` and `$REPLICA` are members, `<` begins what is typed, and `↵` is the return key. The cluster is
//! `demo`, and `nowhere` is none.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use trunkline_tests::patroni::{Ctl, Said};
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Spec, Timing, patroni, rest, wait};

/// What changes the cluster, and back: one of the two carries a whole group out, and then the other.
const CHANGES: &[&[&str]] = &[
    &["pause demo --wait", "pause demo", "list demo", "resume demo --wait", "resume", "pause demo", "resume demo"],
    &["restart demo $REPLICA < now↵y↵↵"],
    &[
        "restart demo --force --scheduled 2031-01-01T00:00:00+00:00",
        "restart demo $REPLICA --scheduled 2031-01-02T00:00:00 --pg-version 15.99 --force",
        "list demo -f json",
        "list demo -f tsv",
        "topology demo",
        "restart demo $REPLICA --scheduled 2031-01-02T00:00:00 < y↵15.99↵",
        "restart demo $REPLICA < 2031-01-02 00:00 UTC↵y↵↵",
        "flush demo restart --force",
        "flush demo restart --force",
    ],
    &[
        "switchover demo --force --scheduled 2031-01-01T00:00:00+00:00 --candidate $REPLICA",
        "list demo",
        "switchover demo < ↵↵2031-01-01 00:00 UTC↵y↵",
        "flush demo switchover",
        "flush demo switchover",
    ],
    &[
        "edit-config demo --force -s maximum_lag_on_failover=4711 -p work_mem=5MB -s slots.x.type=physical",
        "show-config demo",
        "edit-config demo -s maximum_lag_on_failover=1048576 -s slots=null -s nothing.at.all=null < y↵",
        "edit-config demo --apply - --force -q < {postgresql: {parameters: {work_mem: null}}, extra: [1, on, ~, 1.5, 'on']}↵",
        "show-config",
        "edit-config demo -s extra=null --force --quiet",
        "edit-config demo < y↵",
        "edit-config demo -s edited=null --force",
        "show-config demo",
    ],
    &["reinit demo $REPLICA --from-leader --wait < y↵"],
];

/// What makes the replica the leader, and what is said in the end: one of the two does, and then the other makes it the replica again.
const CHANGES_OF_LEADERS: [(&str, &str); 2] = [
    ("switchover demo --leader $LEADER --candidate $REPLICA < now↵y↵", "Successfully switched over to \"the replica\""),
    ("failover demo --candidate $REPLICA < y↵", "Successfully failed over to \"the replica\""),
];

/// What changes nothing, or is refused.
const LOOKS: &[&str] = &[
    "list demo",
    "list",
    "list demo -e",
    "list -f tsv demo",
    "list demo -e -f json",
    "list demo -f yaml",
    "list demo nowhere -f yml",
    "list nowhere",
    "list demo -t",
    "-d etcd3://$ETCD list demo",
    "-k list demo",
    "topology demo",
    "topology nowhere",
    "show-config demo",
    "show-config nowhere",
    "history demo",
    "history demo -f tsv",
    "history -f json",
    "history demo -f yaml",
    "history nowhere",
    "dsn demo",
    "dsn demo -r replica",
    "dsn -m $REPLICA",
    "dsn demo -m $LEADER -r any",
    "dsn demo -m nobody",
    "dsn demo -r standby-leader",
    "dsn nowhere",
    "query demo -U postgres -d postgres -f - < SELECT 1 AS one, 'x'::text, NULL, true, ARRAY[1, NULL], '{\"a\": [1.5]}'::jsonb↵",
    "query demo -U postgres -d postgres -f - --format json < SELECT 1 AS one, NULL AS none, 1.5::float8 AS f, '{}'::text[] AS list↵",
    "query demo -U postgres -d postgres -f - --format yaml < SELECT 1 AS one, NULL AS none, 'a: b' AS quoted↵",
    "query demo -U postgres -d postgres -f - --format pretty < SELECT 1 AS one, true AS yes, E'a\\nb' AS lines↵",
    "query demo -U postgres -d postgres -f - < SELECT now()::date, interval '1 day 2 hours', 1.50, 'a'::\"char\"↵",
    "query demo -U postgres -d postgres -f - < SELECT 2 AS two; SELECT 3 AS three↵",
    "query demo -U postgres -d postgres -c SELECT(pg_is_in_recovery()) -r replica",
    "query demo -U postgres -d postgres -c VALUES(pg_is_in_recovery(),2) -r primary --delimiter ;",
    "query demo -U postgres -d postgres -c VALUES(pg_is_in_recovery(),2) -m $REPLICA --delimiter ;",
    "query demo -U postgres -d postgres -c VALUES(1) -r standby-leader",
    "query demo -U postgres -d postgres -c VALUES(1) -m nobody",
    "query demo -U postgres -d postgres -c VALUES(1) -m $LEADER -r any",
    "query demo -U postgres -d postgres -c VALUES(1/0)",
    "query demo -U postgres -d postgres -c VALUES(1/0) --format json",
    "query demo -U postgres -d postgres -c CHECKPOINT",
    "query demo -U postgres -d postgres -c VALUES(1 < ",
    "query demo -U postgres -d nowhere -c VALUES(1)",
    "query demo -U nobody -d postgres -c VALUES(1)",
    "query demo",
    "query demo -c VALUES(1) -f -",
    "query nowhere -c VALUES(1)",
    "resume demo",
    "pause nowhere",
    "switchover nowhere",
    "switchover demo",
    "switchover demo --leader $REPLICA --force",
    "switchover demo --leader nobody --force",
    "switchover demo --candidate $LEADER --force",
    "switchover demo --candidate nobody --force",
    "switchover demo --force --scheduled yesterday",
    "switchover demo --force --scheduled 2020-01-01T00:00:00+00:00",
    "switchover demo --primary $LEADER --candidate $REPLICA --scheduled 2031-01-01T00:00:00+00:00",
    "switchover demo < ↵↵↵n↵",
    "switchover demo < ↵$REPLICA↵2031-01-01T00:00:00+00:00↵n↵",
    "switchover demo < nobody↵",
    "switchover demo < ↵nobody↵",
    "failover nowhere --force",
    "failover demo --force",
    "failover demo --candidate $LEADER --force",
    "failover demo --candidate nobody --force",
    "failover demo --candidate $REPLICA < n↵",
    "failover demo < ↵",
    "restart nowhere --force",
    "restart demo nobody --force",
    "restart demo nobody $LEADER --pending --force",
    "restart demo $LEADER -r replica --force",
    "restart demo -r standby-leader --force",
    "restart demo --pending --any --force",
    "restart demo --force --pg-version 15",
    "restart demo --force --pg-version one.two",
    "restart demo --force --pg-version 9.6.0",
    "restart demo --force --timeout soon",
    "restart demo --force --scheduled tomorrow",
    "restart demo --force --scheduled 2020-01-01T00:00:00+00:00",
    "restart demo < ↵n↵",
    "restart demo $REPLICA < now↵y↵10↵",
    "restart demo $REPLICA $LEADER < 2031-01-01T00:00:00+00:00↵n↵",
    "restart demo --pending < 2031-01-01T00:00:00+00:00↵what↵n↵",
    "reload nowhere --force",
    "reload demo nobody --force",
    "reload demo < n↵",
    "reload demo < y↵",
    "reload demo -r replica --force",
    "reinit nowhere --force",
    "reinit demo $LEADER --force",
    "reinit demo nobody --force",
    "reinit demo --force",
    "reinit demo < ↵",
    "reinit demo < nobody↵",
    "reinit demo < $REPLICA↵n↵",
    "flush demo restart --force",
    "flush demo nobody restart --force",
    "flush demo $REPLICA restart < n↵",
    "flush demo switchover",
    "flush nowhere switchover",
    "remove nowhere",
    "remove nowhere < nowhere↵Yes I am aware↵",
    "remove demo < other↵",
    "remove demo -f json < demo↵yes↵",
    "remove demo < demo↵Yes I am aware↵nobody↵",
    "version",
    "version demo",
    "version demo $REPLICA",
    "version nowhere",
    "edit-config demo -s nothing",
    "edit-config demo -s loop_wait=1",
    "edit-config demo -q -s loop_wait=1",
    "edit-config nowhere -s ttl=20",
    "edit-config demo -s ttl=40 -s postgresql.parameters.a.b=c -p work_mem=5MB < n↵",
    "edit-config demo --apply - < ttl: 40↵",
    "edit-config demo --replace - -q < ttl: 40↵",
    "edit-config demo --replace - < {}↵",
    "edit-config demo < n↵",
    "demote-cluster demo --force",
    "demote-cluster demo --port 5432 < n↵",
    "demote-cluster nowhere --port 5432 --force",
    "promote-cluster demo --force",
    "promote-cluster nowhere --force",
    "-c /nowhere list",
];

/// The same in a pause.
const IN_A_PAUSE: &[&str] = &[
    "list demo",
    "list demo -f json",
    "topology demo",
    "pause demo",
    "switchover demo --force",
    "switchover demo --force --scheduled 2031-01-01T00:00:00+00:00",
    "restart demo --force --scheduled 2031-01-01T00:00:00+00:00",
];

/// The same while settings wait for a restart.
const PENDING_A_RESTART: &[&str] = &[
    "list demo",
    "list demo -f tsv",
    "list demo -f json",
    "list demo -f yaml",
    "topology demo",
    "flush demo restart < n↵",
];

/// The exit code, and something that is said on standard output or standard error.
type End = (i32, &'static str);

/// What is different on purpose: how `patronictl` ends, and ours.
const DIFFERENT: &[(&str, End, End)] = &[
    // How to use it is said by each for itself.
    ("", (2, "Usage: patronictl [OPTIONS] COMMAND"), (2, "Usage: trunklinectl [OPTIONS] <COMMAND>")),
    ("nothing", (2, "Error: No such command 'nothing'."), (2, "error: unrecognized subcommand 'nothing'")),
    ("list demo -f xml", (2, "'xml' is not one of 'pretty'"), (2, "invalid value 'xml'")),
    ("list demo --nothing", (2, "No such option"), (2, "unexpected argument '--nothing'")),
    ("restart", (2, "Error: Missing argument 'CLUSTER_NAME'."), (2, "<CLUSTER>")),
    ("dsn demo -r boss", (2, "'boss' is not one of 'leader'"), (2, "invalid value 'boss'")),
    ("flush demo everything", (2, "'everything' is not one of"), (2, "The last argument is restart or switchover")),
    // What can not be used is named with a remedy, and not with a traceback.
    ("edit-config demo --apply /nowhere", (1, "FileNotFoundError: "), (1, "Error: Can not read /nowhere: ")),
    ("edit-config demo --apply - < [1]↵", (1, "AttributeError: "), (1, "Error: - is not a configuration: ")),
    ("edit-config demo -s a=[", (1, "yaml.parser.ParserError: "), (1, "Error: a=[: the value is not YAML")),
    ("-d nowhere://x list demo", (1, "Error: Unknown dcs scheme: nowhere"), (1, "only etcd (v3 API) is")),
    // Python's JSON has no dates.
    (
        "query demo -U postgres -d postgres -c VALUES('2031-01-01'::date) --format json",
        (1, "TypeError: Object of type date is not JSON serializable"),
        (0, r#"[{"column1": "2031-01-01"}]"#),
    ),
    // Python warns that others may read what is typed where no terminal is.
    (
        "query demo -U postgres -d postgres -c VALUES(1) --password < wrong↵",
        (0, "Warning: Password input may be echoed.\nPassword: \n"),
        (0, "failed for user \"postgres\" \nPassword: \n"),
    ),
];

/// A cluster and who is asked about it.
struct Stage {
    cluster: Cluster,
    clients: Vec<Clients>,
    /// What was not the same.
    found: Vec<String>,
}

/// The two.
struct Clients {
    theirs: Ctl,
    ours: Program,
    environment: Vec<(&'static str, String)>,
    /// Of `$NAME` in a case.
    names: [(&'static str, String); 3],
}

impl Clients {
    fn of(cluster: &Cluster, leader: usize) -> Result<Self> {
        let node = |node: usize| cluster.nodes[node].name().to_owned();
        let etcd = cluster.etcd()[0].clone();
        let names = [("$LEADER", node(leader)), ("$REPLICA", node(1 - leader)), ("$ETCD", etcd)];
        let environment = vec![
            ("PATRONICTL_CONFIG_FILE", cluster.nodes[0].config().display().to_string()),
            ("PGPASSWORD", cluster.spec().password.clone()),
            ("EDITOR", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clusters/editor.sh").to_owned()),
            // Local times are not UTC.
            ("TZ", "Europe/Berlin".to_owned()),
        ];
        let ours = Program::new(Program::agent()?.path.with_file_name("trunklinectl"));
        Ok(Self { theirs: Ctl::load(&environment)?, ours, environment, names })
    }

    /// What `patronictl` says, or ours.
    fn said(&mut self, by_patroni: bool, case: &str) -> Result<Said> {
        let named =
            |text: &str| self.names.iter().fold(text.to_owned(), |text, (name, value)| text.replace(name, value));
        let (line, typed) = case.split_once(" < ").unwrap_or((case, ""));
        let (line, typed) = (named(line), named(typed).replace('↵', "\n"));
        let arguments: Vec<&str> = line.split_whitespace().collect();
        let said = if by_patroni { self.theirs.run(&arguments, &typed)? } else { self.run(&arguments, &typed)? };
        // The name and the number of each.
        let own = concat!("trunklinectl version ", env!("CARGO_PKG_VERSION"));
        let out = said.out.replace("patronictl version 4.1.4", own);
        Ok(Said { out: with_forms(&out, TIMES), ..said })
    }

    fn run(&self, arguments: &[&str], typed: &str) -> Result<Said> {
        let mut command = Command::new(&self.ours.path);
        command.args(arguments).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().context("trunklinectl")?;
        // Whoever asks for less has ended before all of it is typed.
        let _ = process.stdin.take().context("its input")?.write_all(typed.as_bytes());
        let ended = process.wait_with_output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Said { code: ended.status.code().unwrap_or(-1), out: text(&ended.stdout), err: text(&ended.stderr) })
    }

    /// What both say, where it is not the same. Positions may move on between the two, so they are asked again then.
    fn look(&mut self, case: &str) -> Result<Option<String>> {
        let mut last = None;
        for _ in 0..5 {
            let (theirs, ours) = (self.said(true, case)?, self.said(false, case)?);
            if theirs == ours {
                return Ok(None);
            }
            last = Some(beside(case, &theirs, &ours));
        }
        Ok(last)
    }
}

impl Stage {
    async fn set(mut cluster: Cluster) -> Result<Self> {
        let leader = cluster.leader(LIMIT).await?;
        // Most of the time patronictl waits, so several do at once.
        let clients = (0..4).map(|_| Clients::of(&cluster, leader)).collect::<Result<_>>()?;
        Ok(Self { cluster, clients, found: Vec::new() })
    }

    async fn looks(&mut self, cases: &[&str]) -> Result<()> {
        self.cluster.settled(LIMIT).await?;
        let at_once = self.clients.len();
        let found: Vec<Result<Vec<Option<String>>>> = std::thread::scope(|scope| {
            let ask = |(n, clients): (usize, &'_ mut Clients)| {
                cases.iter().skip(n).step_by(at_once).map(|case| clients.look(case)).collect()
            };
            let asked: Vec<_> = self.clients.iter_mut().enumerate().map(|one| scope.spawn(move || ask(one))).collect();
            asked.into_iter().map(|one| one.join().unwrap_or_else(|_| Err(anyhow!("a panic")))).collect()
        });
        for found in found {
            self.found.extend(found?.into_iter().flatten());
        }
        Ok(())
    }

    fn differences(&mut self) -> Result<()> {
        for (case, theirs, ours) in DIFFERENT {
            for (by_patroni, (code, text)) in [(true, theirs), (false, ours)] {
                let said = self.clients[0].said(by_patroni, case)?;
                let is_so = said.code == *code && format!("{}{}", said.out, said.err).contains(text);
                self.found.extend((!is_so).then(|| format!("{case}: not {code} {text:?} but {said:#?}")));
            }
        }
        Ok(())
    }

    async fn changes(&mut self) -> Result<()> {
        for cases in CHANGES {
            let mut theirs = Vec::new();
            for by_patroni in [true, false] {
                for (n, case) in cases.iter().enumerate() {
                    self.told().await?;
                    let said = self.clients[0].said(by_patroni, case)?;
                    let said = Said { out: with_forms(&said.out, POSITIONS), ..said };
                    match theirs.get(n) {
                        None => theirs.push(said),
                        Some(theirs) if *theirs == said => {}
                        Some(theirs) => self.found.push(beside(case, theirs, &said)),
                    }
                }
            }
        }
        Ok(())
    }

    /// The cluster is settled, and shows what its members know of their restarts: a turn of Patroni's that began before one was
    /// scheduled or deleted may write its member's key after that.
    async fn told(&mut self) -> Result<()> {
        self.cluster.settled(LIMIT).await?;
        wait::until("the cluster to show the scheduled restarts", LIMIT, async || {
            let shown = rest::get(self.cluster.nodes[0].rest_port(), "/cluster").await?.body;
            for node in &self.cluster.nodes {
                let mut members = shown["members"].as_array().into_iter().flatten();
                let member = members.find(|member| member["name"] == node.name()).context("a member is missing")?;
                let knows = !node.status().await?["scheduled_restart"].is_null();
                ensure!(knows != member["scheduled_restart"].is_null(), "{member}");
            }
            Ok(())
        })
        .await
    }

    /// Who leads and who follows is the other way round for the second of the two. Their tables show what has become of the old leader
    /// by then, and ours tells each step of a change that takes its time, on standard error.
    async fn change_of_leaders(&mut self, case: &str, done: &str) -> Result<()> {
        let mut all = Vec::new();
        for by_patroni in [true, false] {
            self.cluster.settled(LIMIT).await?;
            let said = self.clients[0].said(by_patroni, case)?;
            let lines: Vec<&str> = said.out.lines().filter(|line| !line.starts_with(['+', '|'])).collect();
            let [(_, leader), (_, replica), _] = &self.clients[0].names;
            let out = lines.join("\n").replace(leader, "the leader").replace(replica, "the replica");
            all.push(Said { out, err: String::new(), ..said });
            for Clients { names: [(_, leader), (_, replica), _], .. } in &mut self.clients {
                std::mem::swap(leader, replica);
            }
        }
        ensure!(all[0].out.ends_with(done), "{all:#?}");
        self.found.extend((all[0] != all[1]).then(|| beside(case, &all[0], &all[1])));
        Ok(())
    }

    /// Changes the configuration and waits until every member shows it.
    async fn configure(&self, patch: Value, shown: &str, value: Value) -> Result<()> {
        self.cluster.patch_config(&patch).await?;
        for node in &self.cluster.nodes {
            let heard = wait::until(format!("{} to show {shown}: {value}", node.name()), LIMIT, async || {
                let status = node.status().await?;
                ensure!(status[shown] == value, "{status}");
                Ok(())
            });
            heard.await?;
        }
        Ok(())
    }
}

fn beside(case: &str, theirs: &Said, ours: &Said) -> String {
    let said =
        |by: &str, said: &Said| format!("--- {by} {case}: {}\n{}--- its errors\n{}", said.code, said.out, said.err);
    said("patronictl", theirs) + &said("trunklinectl", ours)
}

/// The time of day: what is said now begins with it, or gives it as an example. `d` is a digit.
const TIMES: &[&str] =
    &["dddd-dd-dd dd:dd:dd\n", "dddd-dd-dd dd:dd:dd\t", "dddd-dd-dd dd:dd:dd.ddddd ", "(e.g. dddd-dd-ddTdd:dd"];

/// Positions in the WAL, which move on from one change to the next. `x` is a hexadecimal digit.
const POSITIONS: &[&str] = &["0/xxxxxxx"];

/// The text with these forms in place of what has them.
fn with_forms(text: &str, forms: &[&'static str]) -> String {
    let has = |text: &str, form: &str| {
        let is = |(byte, form): (u8, u8)| match form {
            b'd' => byte.is_ascii_digit(),
            b'x' => byte.is_ascii_hexdigit(),
            other => byte == other,
        };
        text.len() >= form.len() && text.bytes().zip(form.bytes()).all(is)
    };
    let (mut out, mut rest) = (String::new(), text);
    while let Some(first) = rest.chars().next() {
        let form = forms.iter().find(|form| has(rest, form));
        let (shown, length) = form.map_or((&rest[..first.len_utf8()], first.len_utf8()), |form| (form, form.len()));
        out.push_str(shown);
        rest = &rest[length..];
    }
    out
}

async fn both_say_the_same(name: &str, agent: Program) -> Result<()> {
    let lab = Lab::new(name)?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut spec = Spec::new(2, &agent);
    spec.timing = Timing::PATRONI_LOWEST;
    let parameters = json!({ "wal_retrieve_retry_interval": "200ms" });
    spec.local = json!({ "tags": { "zone": "a: b", "rank": 1 }, "postgresql": { "parameters": parameters } });
    let mut stage = Stage::set(Cluster::start(&lab, &etcd.endpoints(), spec).await?).await?;

    stage.changes().await?;
    for (case, done) in CHANGES_OF_LEADERS {
        stage.change_of_leaders(case, done).await?;
    }
    stage.looks(LOOKS).await?;
    stage.differences()?;
    stage.configure(json!({ "pause": true }), "pause", json!(true)).await?;
    stage.looks(IN_A_PAUSE).await?;
    stage.configure(json!({ "pause": null }), "pause", json!(null)).await?;
    let parameters = json!({ "superuser_reserved_connections": 5, "wal_buffers": "2MB" });
    stage.configure(json!({ "postgresql": { "parameters": parameters } }), "pending_restart", json!(true)).await?;
    stage.looks(PENDING_A_RESTART).await?;
    ensure!(stage.found.is_empty(), "{} differences:\n{}", stage.found.len(), stage.found.join("\n"));
    lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_command_lines_say_the_same_about_our_agents() -> Result<()> {
    both_say_the_same("cli-ours", Program::agent()?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_command_lines_say_the_same_about_patroni() -> Result<()> {
    both_say_the_same("cli-theirs", patroni::program()?).await
}
