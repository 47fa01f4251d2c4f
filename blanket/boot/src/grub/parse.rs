//! GRUB's script language to a tree (GRUB manual, "The GRUB scripting language").

use std::rc::Rc;

/// Deepest nesting of blocks.
const MAX_DEPTH: u32 = 32;
/// Commands of one file.
const MAX_COMMANDS: u32 = 50_000;

/// A piece of a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// As it is.
    Text(String),
    /// The value of a variable; outside quotes it is split at spaces.
    Variable { name: String, quoted: bool },
}

/// A word before its variables have values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Word {
    pub parts: Vec<Part>,
    /// Some of it was in quotes, so that it is a word even if it is empty.
    pub quoted: bool,
}

impl Word {
    /// Its text, if it is one bare word.
    fn bare(&self) -> Option<&str> {
        match self.parts.as_slice() {
            [Part::Text(text)] if !self.quoted => Some(text),
            _ => None,
        }
    }
}

/// Commands, one after the other.
pub type Block = Rc<[Node]>;

/// A command or a construct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    Command(Vec<Word>),
    /// `menuentry` or `submenu`: all words, and the block.
    Menu(Vec<Word>, Block),
    /// Conditions with what to do, and what else to do.
    If(Vec<(Block, Block)>, Block),
    /// `while` or, with `true`, `until`.
    While(bool, Block, Block),
    For(String, Vec<Word>, Block),
    Function(String, Block),
}

/// What is not GRUB's language.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}")]
pub struct SyntaxError {
    /// From 1.
    pub line: u32,
    /// What is wrong there.
    pub what: &'static str,
}

/// Parses a whole file.
pub fn parse(text: &str) -> Result<Block, SyntaxError> {
    let mut parser = Parser {
        rest: text,
        line: 1,
        commands: 0,
    };
    let (block, end) = parser.block(&[], 0)?;
    match end {
        End::File => Ok(block),
        _ => Err(parser.error("a word that ends a block, without the block")),
    }
}

enum Token {
    Word(Word),
    /// A newline or a semicolon.
    Stop,
    Open,
    Close,
    End,
}

/// What ended a block.
#[derive(PartialEq, Eq)]
enum End {
    File,
    Brace,
    Keyword(&'static str),
}

struct Parser<'a> {
    rest: &'a str,
    line: u32,
    commands: u32,
}

impl Parser<'_> {
    fn error(&self, what: &'static str) -> SyntaxError {
        SyntaxError {
            line: self.line,
            what,
        }
    }

    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.rest = &self.rest[next.len_utf8()..];
        if next == '\n' {
            self.line += 1;
        }
        Some(next)
    }

    fn token(&mut self) -> Result<Token, SyntaxError> {
        loop {
            match self.peek() {
                None => return Ok(Token::End),
                Some('\n' | ';') => {
                    self.next();
                    return Ok(Token::Stop);
                }
                Some('{') => {
                    self.next();
                    return Ok(Token::Open);
                }
                Some('}') => {
                    self.next();
                    return Ok(Token::Close);
                }
                Some('#') => {
                    while self.peek().is_some_and(|next| next != '\n') {
                        self.next();
                    }
                }
                Some('\\') if self.rest.starts_with("\\\n") => {
                    self.next();
                    self.next();
                }
                Some('\\') if self.rest.starts_with("\\\r\n") => {
                    for _ in 0..3 {
                        self.next();
                    }
                }
                Some(space) if space.is_ascii_whitespace() => {
                    self.next();
                }
                Some(_) => return self.word().map(Token::Word),
            }
        }
    }

    fn word(&mut self) -> Result<Word, SyntaxError> {
        let mut word = Word::default();
        let mut text = String::new();
        while let Some(next) = self.peek() {
            match next {
                '\n' | ';' | '{' | '}' => break,
                space if space.is_ascii_whitespace() => break,
                '\\' => {
                    self.next();
                    match self.next() {
                        Some('\n') | None => {}
                        Some(other) => text.push(other),
                    }
                }
                '\'' => {
                    self.next();
                    word.quoted = true;
                    loop {
                        match self.next() {
                            Some('\'') => break,
                            Some(other) => text.push(other),
                            None => return Err(self.error("a quote without an end")),
                        }
                    }
                }
                '"' => {
                    self.next();
                    word.quoted = true;
                    self.double_quoted(&mut word, &mut text)?;
                }
                '$' => self.variable(&mut word, &mut text, false)?,
                other => {
                    self.next();
                    text.push(other);
                }
            }
        }
        if !text.is_empty() {
            word.parts.push(Part::Text(text));
        }
        Ok(word)
    }

    fn double_quoted(&mut self, word: &mut Word, text: &mut String) -> Result<(), SyntaxError> {
        loop {
            match self.peek() {
                None => return Err(self.error("a quote without an end")),
                Some('"') => {
                    self.next();
                    return Ok(());
                }
                Some('\\') => {
                    self.next();
                    match self.next() {
                        Some('\n') => {}
                        Some(escaped @ ('$' | '"' | '\\')) => text.push(escaped),
                        Some(other) => text.extend(['\\', other]),
                        None => return Err(self.error("a quote without an end")),
                    }
                }
                Some('$') => self.variable(word, text, true)?,
                Some(other) => {
                    self.next();
                    text.push(other);
                }
            }
        }
    }

    /// From a dollar sign on.
    fn variable(
        &mut self,
        word: &mut Word,
        text: &mut String,
        quoted: bool,
    ) -> Result<(), SyntaxError> {
        self.next();
        let name = if self.peek() == Some('{') {
            let inner = &self.rest[1..];
            let end = inner
                .find(['}', '\n'])
                .filter(|end| inner[*end..].starts_with('}'))
                .ok_or_else(|| self.error("${ without an end"))?;
            self.rest = &inner[end + 1..];
            inner[..end].to_owned()
        } else if let Some(special) = self.peek().filter(|next| "@*#?".contains(*next)) {
            self.next();
            special.to_string()
        } else {
            let first_is_digit = self.peek().is_some_and(|next| next.is_ascii_digit());
            let end = self
                .rest
                .find(|next: char| {
                    !(next.is_ascii_digit()
                        || !first_is_digit && (next.is_ascii_alphabetic() || next == '_'))
                })
                .unwrap_or(self.rest.len());
            let (name, rest) = self.rest.split_at(end);
            self.rest = rest;
            name.to_owned()
        };
        if name.is_empty() {
            text.push('$');
            return Ok(());
        }
        if !text.is_empty() {
            word.parts.push(Part::Text(std::mem::take(text)));
        }
        word.parts.push(Part::Variable { name, quoted });
        Ok(())
    }

    /// Commands up to one of `ends`, a closing brace, or the end of the file.
    fn block(&mut self, ends: &[&'static str], depth: u32) -> Result<(Block, End), SyntaxError> {
        if depth > MAX_DEPTH {
            return Err(self.error("blocks are nested too deeply"));
        }
        let mut nodes = Vec::new();
        let end = loop {
            let first = match self.token()? {
                Token::End => break End::File,
                Token::Close => break End::Brace,
                Token::Stop => continue,
                Token::Open => return Err(self.error("a block without a command")),
                Token::Word(word) => word,
            };
            self.commands += 1;
            if self.commands > MAX_COMMANDS {
                return Err(self.error("the file has too many commands"));
            }
            let bare = first.bare().unwrap_or_default();
            if let Some(end) = ends.iter().find(|end| **end == bare) {
                break End::Keyword(end);
            }
            let node = match bare {
                "if" => self.conditional(depth)?,
                "while" | "until" => {
                    let until = bare == "until";
                    let condition = self.until(&["do"], depth)?;
                    let body = self.until(&["done"], depth)?;
                    Node::While(until, condition, body)
                }
                "for" => self.for_loop(depth)?,
                "function" => self.function(depth)?,
                "then" | "elif" | "else" | "fi" | "do" | "done" => {
                    return Err(self.error("a word that ends a block, without the block"));
                }
                _ => {
                    let (node, last) = self.command(first, depth)?;
                    nodes.push(node);
                    match last {
                        Token::Close => break End::Brace,
                        Token::End => break End::File,
                        _ => continue,
                    }
                }
            };
            nodes.push(node);
        };
        Ok((nodes.into(), end))
    }

    /// A block that must end with one of `ends`.
    fn until(&mut self, ends: &[&'static str], depth: u32) -> Result<Block, SyntaxError> {
        match self.block(ends, depth + 1)? {
            (block, End::Keyword(_)) => Ok(block),
            _ => Err(self.error("a block without its end")),
        }
    }

    fn braces(&mut self, depth: u32) -> Result<Block, SyntaxError> {
        match self.block(&[], depth + 1)? {
            (block, End::Brace) => Ok(block),
            _ => Err(self.error("a brace without its end")),
        }
    }

    fn conditional(&mut self, depth: u32) -> Result<Node, SyntaxError> {
        let mut arms = Vec::new();
        loop {
            let condition = self.until(&["then"], depth)?;
            let (body, end) = self.block(&["elif", "else", "fi"], depth + 1)?;
            arms.push((condition, body));
            match end {
                End::Keyword("elif") => {}
                End::Keyword("else") => {
                    let other = self.until(&["fi"], depth)?;
                    return Ok(Node::If(arms, other));
                }
                End::Keyword("fi") => return Ok(Node::If(arms, Rc::new([]))),
                _ => return Err(self.error("if without fi")),
            }
        }
    }

    fn for_loop(&mut self, depth: u32) -> Result<Node, SyntaxError> {
        let Token::Word(name) = self.token()? else {
            return Err(self.error("for without a variable"));
        };
        let mut words = Vec::new();
        loop {
            match self.token()? {
                Token::Word(word) => words.push(word),
                Token::Stop => break,
                _ => return Err(self.error("for without do")),
            }
        }
        if words.first().and_then(Word::bare) == Some("in") {
            words.remove(0);
        }
        loop {
            match self.token()? {
                Token::Stop => {}
                Token::Word(word) if word.bare() == Some("do") => break,
                _ => return Err(self.error("for without do")),
            }
        }
        let body = self.until(&["done"], depth)?;
        Ok(Node::For(
            name.bare().unwrap_or_default().to_owned(),
            words,
            body,
        ))
    }

    fn function(&mut self, depth: u32) -> Result<Node, SyntaxError> {
        let Token::Word(name) = self.token()? else {
            return Err(self.error("a function without a name"));
        };
        loop {
            match self.token()? {
                Token::Stop => {}
                Token::Open => break,
                _ => return Err(self.error("a function without a body")),
            }
        }
        let name = name.bare().unwrap_or_default().to_owned();
        Ok(Node::Function(name, self.braces(depth)?))
    }

    /// A command from its first word on, and what came after it.
    fn command(&mut self, first: Word, depth: u32) -> Result<(Node, Token), SyntaxError> {
        let is_menu = matches!(first.bare(), Some("menuentry" | "submenu"));
        let mut words = vec![first];
        loop {
            match self.token()? {
                Token::Word(word) => words.push(word),
                Token::Open if is_menu => {
                    let body = self.braces(depth)?;
                    return Ok((Node::Menu(words, body), Token::Stop));
                }
                Token::Open => return Err(self.error("a block where none can be")),
                last => return Ok((Node::Command(words), last)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(word: &Word) -> String {
        let part = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Variable { name, quoted } => {
                format!("<{name}{}>", if *quoted { "!" } else { "" })
            }
        };
        word.parts.iter().map(part).collect()
    }

    fn words(line: &str) -> Vec<String> {
        match &parse(line).unwrap()[..] {
            [Node::Command(words)] => words.iter().map(text).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn quotes() {
        assert_eq!(
            words(r#"a 'b $c "d"' "e $f \" \n" g\ h"#),
            ["a", "b $c \"d\"", "e <f!> \" \\n", "g h"]
        );
        assert_eq!(
            words("x$feature_y=z ${a}b $1c $ $"),
            ["x<feature_y>=z", "<a>b", "<1>c", "$", "$"]
        );
        assert_eq!(words("a '' \\\n b # c"), ["a", "", "b"]);
        assert_eq!(words("set a=b#c"), ["set", "a=b#c"]);
    }

    #[test]
    fn blocks() {
        let block = parse(
            "function f {\n a\n}\nif [ x$b = xc ]; then insmod d; elif e; then\nf\nelse g; fi\n\
             menuentry 'T' --id i { linux /v a=b }\nfor x in 1 2; do echo $x; done\n\
             while false; do h; done",
        )
        .unwrap();
        assert_eq!(block.len(), 5);
        let Node::If(arms, other) = &block[1] else {
            panic!("{block:?}")
        };
        assert_eq!((arms.len(), other.len()), (2, 1));
        let Node::Menu(words, body) = &block[2] else {
            panic!("{block:?}")
        };
        assert_eq!((words.len(), body.len()), (4, 1));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        let error = |text: &str| parse(text).unwrap_err();
        assert_eq!(error("a\nb 'c").line, 2);
        assert_eq!(error("\nif a; then b").what, "if without fi");
        assert_eq!(error("menuentry a {\n b").what, "a brace without its end");
        assert!(parse(&"if ".repeat(100_000)).is_err());
        assert!(parse(&"menuentry a {".repeat(100_000)).is_err());
        assert!(parse("}").is_err() && parse("fi").is_err() && parse("a {").is_err());
    }

    proptest! {
        #[test]
        fn anything_is_taken_or_refused(text in "[a-z'\"{}$;\\\\ \n#]{0,200}") {
            let _ = parse(&text);
        }

        #[test]
        fn words_keep_what_single_quotes_hold(inner in "[^']{0,40}") {
            let line = format!("a '{inner}'");
            prop_assert_eq!(words(&line), vec!["a".to_owned(), inner]);
        }
    }
}
