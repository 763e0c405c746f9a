//! The table, laid out for the width there is.

use std::fmt::Write;
use std::io::IsTerminal;

/// One line of the table.
#[derive(Debug, Clone)]
pub(super) struct Row {
    /// Whether everything was as it must be.
    pub(super) right: bool,
    /// The cells, in the order of [`HEADS`].
    pub(super) cells: [String; 6],
}

/// What stands over the columns.
const HEADS: [&str; 6] =
    ["what was asked", "fake address", "rule in profiles/demo.yaml", "went to", "what came back", "ms"];
/// The last column holds numbers.
const NUMBERS: usize = HEADS.len() - 1;

/// Draws `rows` in at most `width` columns where that is possible: one line each, or else three short ones.
pub(super) fn draw(rows: &[Row], width: usize) -> String {
    let columns: Vec<usize> = (0..HEADS.len())
        .map(|at| rows.iter().map(|row| row.cells[at].chars().count()).chain([HEADS[at].len()]).max().unwrap_or(0))
        .collect();
    let needed = MARK + columns.iter().map(|column| column + GAP).sum::<usize>();
    if needed <= width { wide(rows, &columns) } else { narrow(rows) }
}

const MARK: usize = 4;
const GAP: usize = 2;

fn mark(right: bool) -> &'static str {
    if right { "ok  " } else { "BAD " }
}

fn wide(rows: &[Row], columns: &[usize]) -> String {
    let line = |cells: [&str; 6]| {
        let mut text = String::new();
        for (at, (cell, column)) in cells.iter().zip(columns).enumerate() {
            // Writing to a String cannot fail.
            let _ = if at == NUMBERS { write!(text, "{cell:>column$}") } else { write!(text, "{cell:column$}  ") };
        }
        text
    };
    let rule = columns.iter().map(|column| "-".repeat(*column)).collect::<Vec<_>>().join("  ");
    let mut text = format!("    {}\n    {rule}\n", line(HEADS));
    for row in rows {
        let _ = writeln!(text, "{}{}", mark(row.right), line(row.cells.each_ref().map(String::as_str)));
    }
    text
}

fn narrow(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows {
        let [asked, fake, rule, way, back, ms] = &row.cells;
        let _ = writeln!(text, "{}{asked}", mark(row.right));
        let _ = writeln!(text, "      fake address {fake}, rule {rule}");
        let _ = writeln!(text, "      {way}: {back}, {ms} ms");
    }
    text
}

/// The columns of the terminal on the standard output; endless where that is none.
pub(super) fn terminal_width() -> usize {
    nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, libc::winsize);
    if !std::io::stdout().is_terminal() {
        return usize::MAX;
    }
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the call fills one `winsize`, which outlives it.
    match unsafe { window_size(libc::STDOUT_FILENO, &raw mut size) } {
        Ok(_) if size.ws_col > 0 => usize::from(size.ws_col),
        _ => 80,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Row> {
        let cells = ["GET a", "198.18.0.9", "3: MATCH", "DIRECT", "200 OK", "1.0"].map(str::to_owned);
        let other = cells.each_ref().map(|cell| format!("{cell}{cell}"));
        vec![Row { right: true, cells }, Row { right: false, cells: other }]
    }

    #[test]
    fn lines_are_aligned_where_there_is_room() {
        let text = draw(&rows(), usize::MAX);
        let starts: Vec<_> = text.lines().map(|line| line.find("198.18").or(line.find("fake address"))).collect();
        assert_eq!(starts[0], starts[2]);
        assert_eq!(starts[2], starts[3]);
        let ends: Vec<_> = text.lines().map(str::len).collect();
        assert!(ends.iter().all(|end| *end == ends[0]), "{text}");
    }

    #[test]
    fn a_narrow_terminal_gets_lines_that_fit() {
        let text = draw(&rows()[..1], 80);
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
        for cell in &rows()[0].cells {
            assert!(text.contains(cell), "{text}");
        }
    }

    #[test]
    fn a_row_that_is_not_as_expected_stands_out() {
        assert!(draw(&rows(), usize::MAX).lines().last().unwrap().starts_with("BAD "));
    }
}
