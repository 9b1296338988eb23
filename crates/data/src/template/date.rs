//! `strftime` for a given time, in UTC.

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] =
    ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Formats seconds since 1970 by Python's codes `%Y %y %m %d %e %B %b %A %a %H %I %M %S %p %j %%`; a `-` after the
/// percent sign drops leading zeros.
pub(super) fn strftime(format: &str, unix_seconds: i64) -> Result<String, Error> {
    let (days, seconds) = (unix_seconds.div_euclid(86400), unix_seconds.rem_euclid(86400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let weekday = DAYS[days.rem_euclid(7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = chars.next().unwrap_or('%');
        let bare = code == '-';
        if bare {
            code = chars.next().unwrap_or('-');
        }
        let number = |value: i64, width: usize| if bare { value.to_string() } else { format!("{value:0width$}") };
        out.push_str(&match code {
            'Y' => year.to_string(),
            'y' => number(year.rem_euclid(100), 2),
            'm' => number(month, 2),
            'd' => number(day, 2),
            'e' => spaced(day),
            'B' => month_name.to_owned(),
            'b' | 'h' => month_name[..3].to_owned(),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            'H' => number(hour, 2),
            'I' => number((hour + 11) % 12 + 1, 2),
            'M' => number(minute, 2),
            'S' => number(second, 2),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'j' => number(days - days_from_civil_new_year(year) + 1, 3),
            '%' => "%".to_owned(),
            other => {
                let detail = format!("`strftime_now` does not know `%{other}`");
                return Err(Error::new(ErrorKind::InvalidOperation, detail));
            }
        });
    }
    Ok(out)
}

fn spaced(day: i64) -> String {
    format!("{day:2}")
}

/// Year, month and day of a day number since 1970 (Hinnant's `civil_from_days`: years begin in March).
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

/// The day number of the first of January.
fn days_from_civil_new_year(year: i64) -> i64 {
    let before = year - 1;
    before * 365 + before.div_euclid(4) - before.div_euclid(100) + before.div_euclid(400) - 719_162
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_as_python_does() {
        let format = "%A %a %d %-d %b %B %Y %y %m %H:%M:%S %I %p %j %%";
        let cases = [
            (0, "Thursday Thu 01 1 Jan January 1970 70 01 00:00:00 12 AM 001 %"),
            (951_827_696, "Tuesday Tue 29 29 Feb February 2000 00 02 12:34:56 12 PM 060 %"),
            (1_732_299_999, "Friday Fri 22 22 Nov November 2024 24 11 18:26:39 06 PM 327 %"),
            (-1, "Wednesday Wed 31 31 Dec December 1969 69 12 23:59:59 11 PM 365 %"),
        ];
        for (time, expected) in cases {
            assert_eq!(strftime(format, time).unwrap(), expected);
        }
        assert!(strftime("%Q", 0).is_err());
    }
}
