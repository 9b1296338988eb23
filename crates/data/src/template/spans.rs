//! Where the answers are in a rendered conversation, as the renderer itself says.

use serde_json::Value;

use super::environment::{ANSWER_CLOSE, ANSWER_OPEN};
use super::{ChatTemplate, Message, Piece};
use crate::error::{Error, Result};

/// How much of two differing texts an error shows, in characters.
const SHOWN: usize = 40;

impl ChatTemplate {
    /// Renders a conversation as pieces, of which the assistant's messages from index `train_from` on are answers.
    ///
    /// The answers come from the template's `{% generation %}` blocks if it has them. Otherwise message i is what
    /// rendering `messages[..=i]` adds to rendering `messages[..i]` with a generation prompt: the answer, its end-of-turn
    /// token, and what the template writes after that. Nothing is searched for in the text.
    ///
    /// One sequence comes back as a rule. Some templates render a turn differently once others follow (Qwen3 takes
    /// earlier thoughts out): then each answer has its own sequence, with the conversation up to it as it is when the
    /// model gives that answer.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and [`Error::NotPrefixStable`] if a prompt is not the beginning of the conversation
    /// that it is the prompt of.
    pub fn answer_pieces(&self, messages: &[Message], tools: Option<&Value>, train_from: usize) -> Result<Vec<Vec<Piece>>> {
        let answers: Vec<usize> = (train_from..messages.len()).filter(|&i| messages[i].is_answer()).collect();
        if self.has_generation_blocks
            && let Some(pieces) = self.generation_pieces(messages, tools, train_from)?
        {
            return Ok(vec![pieces]);
        }
        let full = self.render(messages, tools, false)?;
        let turns = self.turns(messages, tools, &answers, &full)?;
        if let Some(pieces) = one_sequence(&turns, &full) {
            return Ok(vec![pieces]);
        }
        turns.into_iter().map(Turn::into_pieces).collect()
    }

    /// The pieces that generation blocks mark; `None` if they mark nothing in this conversation.
    fn generation_pieces(&self, messages: &[Message], tools: Option<&Value>, train_from: usize) -> Result<Option<Vec<Piece>>> {
        let marked = self.render_marked(messages, tools, false)?;
        let mut pieces = split_marked(&marked);
        if !pieces.iter().any(|p| p.train) {
            return Ok(None);
        }
        if train_from > 0 {
            let before = self.render(&messages[..train_from], tools, false)?;
            let text: String = pieces.iter().map(|p| p.text.as_str()).collect();
            check_prefix(&before, &text, train_from)?;
            let mut at = 0;
            for piece in &mut pieces {
                piece.train &= at >= before.len();
                at += piece.text.len();
            }
        }
        Ok(Some(pieces))
    }

    fn turns(&self, messages: &[Message], tools: Option<&Value>, answers: &[usize], full: &str) -> Result<Vec<Turn>> {
        let turn = |&message: &usize| {
            let prompt = self.render(&messages[..message], tools, true)?;
            let text =
                if message + 1 == messages.len() { full.to_owned() } else { self.render(&messages[..=message], tools, false)? };
            Ok(Turn { message, prompt, text })
        };
        answers.iter().map(turn).collect()
    }
}

/// An answer: its prompt, and the text up to its end.
struct Turn {
    message: usize,
    prompt: String,
    text: String,
}

impl Turn {
    fn into_pieces(self) -> Result<Vec<Piece>> {
        check_prefix(&self.prompt, &self.text, self.message)?;
        let answer = self.text[self.prompt.len()..].to_owned();
        Ok(vec![Piece::prompt(self.prompt), Piece::answer(answer)])
    }
}

/// The whole conversation as one sequence, if every turn is a beginning of it.
fn one_sequence(turns: &[Turn], full: &str) -> Option<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut at = 0;
    for turn in turns {
        let stable = turn.text.starts_with(&turn.prompt) && full.starts_with(&turn.text) && turn.prompt.len() >= at;
        if !stable {
            return None;
        }
        pieces.push(Piece::prompt(&full[at..turn.prompt.len()]));
        pieces.push(Piece::answer(&full[turn.prompt.len()..turn.text.len()]));
        at = turn.text.len();
    }
    pieces.push(Piece::prompt(&full[at..]));
    pieces.retain(|p| !p.text.is_empty());
    Some(pieces)
}

fn check_prefix(prompt: &str, text: &str, message: usize) -> Result<()> {
    if text.starts_with(prompt) {
        return Ok(());
    }
    let same = prompt.chars().zip(text.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    let shown = |t: &str| t[same..].chars().take(SHOWN).collect::<String>();
    Err(Error::NotPrefixStable { message, at: same, expected: shown(prompt), found: shown(text) })
}

/// Splits marked text; of nested blocks the outermost counts.
fn split_marked(text: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut depth = 0_usize;
    for part in text.split_inclusive([ANSWER_OPEN, ANSWER_CLOSE]) {
        let clean = part.trim_end_matches([ANSWER_OPEN, ANSWER_CLOSE]);
        if !clean.is_empty() {
            pieces.push(Piece { text: clean.to_owned(), train: depth > 0 });
        }
        if part.ends_with(ANSWER_OPEN) {
            depth += 1;
        } else if part.ends_with(ANSWER_CLOSE) {
            depth = depth.saturating_sub(1);
        }
    }
    pieces
}
