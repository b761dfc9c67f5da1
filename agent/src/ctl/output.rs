//! The output formats: a sheet of rows as table, tab-separated values, JSON or YAML (cli.md §3).

use serde_json::{Map, Value};
use trunkline_common::dcs::codec::python_json;

use super::table;
use super::text::python_str;
use super::yaml::{document, flow};

/// How rows are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// A bordered table.
    Pretty,
    /// The same, sorted as a tree by `replicatefrom`.
    Topology,
    /// Values with a delimiter between them, column titles first.
    Tsv,
    /// One line.
    Json,
    /// Block style.
    Yaml,
}

impl Format {
    /// Whether it is made for people: then extra lines may follow.
    pub fn is_table(self) -> bool {
        matches!(self, Self::Pretty | Self::Topology)
    }
}

/// Rows with their column titles.
#[derive(Debug, Clone, Default)]
pub(super) struct Sheet {
    /// For the top border; empty: there is none, and empty cells stay in JSON and YAML.
    pub title: String,
    /// Column titles. `None`: the rows have no meaning beyond their order.
    pub columns: Option<Vec<String>>,
    /// As many cells each as there are columns.
    pub rows: Vec<Vec<Value>>,
    /// Leading columns that tables leave out, because the title says it.
    pub skip_in_tables: usize,
    /// Titles of the columns that tables align right.
    pub right: &'static [&'static str],
}

/// Renders a sheet; no line feed at the end, except the one that belongs to YAML.
pub(super) fn render(sheet: &Sheet, format: Format, delimiter: &str) -> String {
    match format {
        Format::Json => python_json(&objects(sheet)),
        Format::Yaml => document(&objects(sheet)),
        Format::Tsv => tsv(sheet, delimiter),
        Format::Pretty | Format::Topology => bordered(sheet, format),
    }
}

fn objects(sheet: &Sheet) -> Value {
    let keep = |value: &Value| sheet.title.is_empty() || *value != *"";
    let object = |row: &Vec<Value>| {
        let pairs = sheet.columns.iter().flatten().zip(row).filter(|(_, value)| keep(value));
        Value::Object(pairs.map(|(name, value)| (name.clone(), value.clone())).collect::<Map<_, _>>())
    };
    Value::Array(sheet.rows.iter().map(object).collect())
}

fn tsv(sheet: &Sheet, delimiter: &str) -> String {
    let header = sheet.columns.iter().filter(|columns| !columns.is_empty()).map(|columns| columns.join(delimiter));
    let row =
        |row: &Vec<Value>| row.iter().map(|value| cell(sheet, value, Format::Tsv)).collect::<Vec<_>>().join(delimiter);
    header.chain(sheet.rows.iter().map(row)).collect::<Vec<_>>().join("\n")
}

fn bordered(sheet: &Sheet, format: Format) -> String {
    let skip = sheet.skip_in_tables;
    let width = sheet.rows.iter().map(Vec::len).max().unwrap_or(0);
    let unnamed = || (1..=width).map(|n| format!("Field {n}")).collect();
    let columns: Vec<String> = sheet.columns.clone().unwrap_or_else(unnamed);
    let columns: Vec<&str> = columns.iter().skip(skip).map(String::as_str).collect();
    let cells = |row: &Vec<Value>| row.iter().skip(skip).map(|value| cell(sheet, value, format)).collect();
    let rows: Vec<Vec<String>> = sheet.rows.iter().map(cells).collect();
    table::pretty(&sheet.title, &columns, &rows, sheet.right)
}

/// A map below a title is a member's tags: block style in tables, flow style where a row is a line.
fn cell(sheet: &Sheet, value: &Value, format: Format) -> String {
    match value {
        Value::Object(map) if !sheet.title.is_empty() => match format {
            Format::Pretty if !map.is_empty() => document(value).trim().to_owned(),
            _ => flow(value),
        },
        Value::Number(_) => python_json(value),
        other => python_str(other),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sheet() -> Sheet {
        Sheet {
            title: " Cluster: demo (7) ".to_owned(),
            columns: Some(["Cluster", "Member", "TL", "Receive Lag", "Tags"].map(str::to_owned).to_vec()),
            rows: vec![
                vec![json!("demo"), json!("pg-a"), json!(5), json!(""), json!({"zone": "a0", "rank": 0})],
                vec![json!("demo"), json!("pg-b"), json!(5), json!(0), json!("")],
            ],
            skip_in_tables: 1,
            right: &["TL"],
        }
    }

    #[test]
    fn json_leaves_empty_cells_out_below_a_title() {
        let expected = "[{\"Cluster\": \"demo\", \"Member\": \"pg-a\", \"TL\": 5, \"Tags\": {\"zone\": \"a0\", \"rank\": 0}}, \
                        {\"Cluster\": \"demo\", \"Member\": \"pg-b\", \"TL\": 5, \"Receive Lag\": 0}]";
        assert_eq!(render(&sheet(), Format::Json, "\t"), expected);
        let untitled = Sheet { title: String::new(), ..sheet() };
        assert!(render(&untitled, Format::Json, "\t").contains("\"Receive Lag\": \"\""));
    }

    #[test]
    fn tsv_keeps_every_cell() {
        let expected = "Cluster\tMember\tTL\tReceive Lag\tTags\n\
                        demo\tpg-a\t5\t\t{rank: 0, zone: a0}\n\
                        demo\tpg-b\t5\t0\t";
        assert_eq!(render(&sheet(), Format::Tsv, "\t"), expected);
    }

    #[test]
    fn yaml_is_sorted_and_ends_with_a_line_feed() {
        let expected = "- Cluster: demo\n  Member: pg-a\n  TL: 5\n  Tags:\n    rank: 0\n    zone: a0\n\
                        - Cluster: demo\n  Member: pg-b\n  Receive Lag: 0\n  TL: 5\n";
        assert_eq!(render(&sheet(), Format::Yaml, "\t"), expected);
    }

    #[test]
    fn tables_skip_the_cluster_and_show_tags_in_lines() {
        let table = render(&sheet(), Format::Pretty, "\t");
        let expected = "\
+ Cluster: demo (7) ---+----------+
| Member | TL | Receive Lag | Tags     |
+--------+----+-------------+----------+
| pg-a   |  5 |             | rank: 0  |
|        |    |             | zone: a0 |
+--------+----+-------------+----------+
| pg-b   |  5 | 0           |          |
+--------+----+-------------+----------+";
        assert_eq!(table.lines().skip(1).collect::<Vec<_>>(), expected.lines().skip(1).collect::<Vec<_>>());
        assert!(render(&sheet(), Format::Topology, "\t").contains("| {rank: 0, zone: a0} |"));
    }

    #[test]
    fn rows_without_titles() {
        let sheet = Sheet { rows: vec![vec![json!("then"), json!("why")]], ..Sheet::default() };
        assert_eq!(render(&sheet, Format::Tsv, "\t"), "then\twhy");
        assert_eq!(render(&sheet, Format::Json, "\t"), "[{}]");
        assert_eq!(render(&sheet, Format::Yaml, "\t"), "- {}\n");
        assert!(render(&sheet, Format::Pretty, "\t").contains("| Field 1 | Field 2 |"));
    }
}
