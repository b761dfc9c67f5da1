//! The bordered table of `list` and its relatives: a title in the top border, columns aligned left or right.

use unicode_width::UnicodeWidthStr;

/// Renders a table. `title` is written into the top border and cut where that is too short; `right` names the columns
/// that are aligned right. If a cell has several lines, a rule separates all rows. No line feed at the end.
pub fn pretty(title: &str, columns: &[&str], rows: &[Vec<String>], right: &[&str]) -> String {
    let header: Vec<Vec<String>> = columns.iter().map(|name| cell_lines(name)).collect();
    let body: Vec<Vec<Vec<String>>> =
        rows.iter().map(|row| row.iter().map(|cell| cell_lines(cell)).collect()).collect();
    let widths: Vec<usize> = (0..columns.len())
        .map(|column| std::iter::once(&header).chain(&body).map(|row| width_of(row.get(column))).max().unwrap_or(0))
        .collect();
    let align_right: Vec<bool> = columns.iter().map(|name| right.contains(name)).collect();
    let rule = rule(&widths);
    let ruled_rows = rows.iter().flatten().any(|cell| cell.contains('\n'));

    let mut lines = vec![with_title(&rule, title)];
    push_row(&mut lines, &header, &widths, &align_right);
    lines.push(rule.clone());
    for row in &body {
        push_row(&mut lines, row, &widths, &align_right);
        if ruled_rows {
            lines.push(rule.clone());
        }
    }
    if !ruled_rows || body.is_empty() {
        lines.push(rule);
    }
    lines.join("\n")
}

/// A cell's lines; tabs take the space up to the next multiple of eight, as on a terminal.
fn cell_lines(text: &str) -> Vec<String> {
    text.split('\n').map(|line| line.trim_end_matches('\r').replace('\t', "        ")).collect()
}

fn width_of(cell: Option<&Vec<String>>) -> usize {
    cell.into_iter().flatten().map(|line| line.width()).max().unwrap_or(0)
}

fn rule(widths: &[usize]) -> String {
    let dashes: Vec<String> = widths.iter().map(|width| "-".repeat(width + 2)).collect();
    format!("+{}+", dashes.join("+"))
}

fn with_title(rule: &str, title: &str) -> String {
    let room = rule.len().saturating_sub(2);
    let title: String = title.chars().take(room).collect();
    let used = 1 + title.chars().count();
    format!("+{title}{}", rule.get(used..).unwrap_or(""))
}

fn push_row(lines: &mut Vec<String>, cells: &[Vec<String>], widths: &[usize], align_right: &[bool]) {
    let height = cells.iter().map(Vec::len).max().unwrap_or(1);
    for n in 0..height {
        let mut line = String::from("|");
        for (column, width) in widths.iter().enumerate() {
            let text = cells.get(column).and_then(|cell| cell.get(n)).map_or("", String::as_str);
            let gap = " ".repeat(width.saturating_sub(text.width()));
            match align_right.get(column) {
                Some(true) => line.push_str(&format!(" {gap}{text} |")),
                _ => line.push_str(&format!(" {text}{gap} |")),
            }
        }
        if widths.is_empty() {
            line.push('|');
        }
        lines.push(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: &[&[&str]]) -> Vec<Vec<String>> {
        rows.iter().map(|row| row.iter().map(|cell| (*cell).to_owned()).collect()).collect()
    }

    #[test]
    fn the_title_stands_in_the_border() {
        let body = rows(&[&["pg-a", "5", "", ""], &["pg-bee", "5", "0", "12"]]);
        let expected = "\
+ Cluster: demo (7) --+-----+
| Member | TL | Lag | Lag |
+--------+----+-----+-----+
| pg-a   |  5 |     |     |
| pg-bee |  5 |   0 |  12 |
+--------+----+-----+-----+";
        let expected = expected.replace("(7) --+-----+", "(7) +-----+");
        assert_eq!(pretty(" Cluster: demo (7) ", &["Member", "TL", "Lag", "Lag"], &body, &["TL", "Lag"]), expected);
    }

    #[test]
    fn a_long_title_is_cut() {
        let expected = "\
+ Cluster: x (uninitialize+
| Member | TL | Lag | Lag |
+--------+----+-----+-----+
+--------+----+-----+-----+";
        let title = " Cluster: x (uninitialized) ";
        assert_eq!(pretty(title, &["Member", "TL", "Lag", "Lag"], &[], &["TL", "Lag"]), expected);
    }

    #[test]
    fn cells_with_several_lines_bring_rules() {
        let expected = "\
+----+-----+--------+
| TL | LSN | Reason |
+----+-----+--------+
|  1 | 2   | 日本   |
|    |     | x      |
+----+-----+--------+
|  1 | 2   |        |
+----+-----+--------+";
        let body = rows(&[&["1", "2", "日本\nx"], &["1", "2", ""]]);
        assert_eq!(pretty("", &["TL", "LSN", "Reason"], &body, &["TL"]), expected);
    }

    #[test]
    fn no_columns_at_all() {
        assert_eq!(pretty("", &[], &[], &[]), "++\n||\n++\n++");
    }
}
