//! How long a test goes on, or how often: as long as a run for every change can bear, or as a variable of the
//! environment asks. `CONTRIBUTING.md` lists the variables.

use std::env;
use std::str::FromStr;
use std::time::Duration;

/// What `variable` asks for, or `few` where it asks for nothing.
///
/// # Panics
/// If it asks for something that is no number: a long run that was asked for must not be a short one in silence.
pub(crate) fn asked<T: FromStr>(variable: &str, few: T) -> T {
    let Some(text) = env::var_os(variable) else { return few };
    let number = text.to_str().and_then(|text| text.parse().ok());
    number.unwrap_or_else(|| panic!("{variable}={} is no number", text.display()))
}

/// The same for a time in seconds.
///
/// # Panics
/// If it asks for something that is no number.
pub(crate) fn seconds(variable: &str, few: u64) -> Duration {
    Duration::from_secs(asked(variable, few))
}
