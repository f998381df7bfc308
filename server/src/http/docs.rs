//! `/docs`: the guide of `docs/api.md` and a reference made from the OpenAPI document, as one page without scripts.

use std::sync::Arc;

use axum::Extension;
use axum::response::Response;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use pulldown_cmark::{CowStr, Event, Options, Parser, Tag, TagEnd};
use serde_json::{Map, Value};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::console::page;
use super::openapi::{Document, commands};
use crate::app::AppState;

/// The part of the page that holds for every request.
const GUIDE: &str = include_str!("../../../docs/api.md");

/// The route of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::default().routes(routes!(docs))
}

/// This document for people.
#[utoipa::path(
    get,
    path = "/docs",
    tag = "pages",
    responses((status = 200, description = "A page.", content_type = "text/html", body = String)),
    extensions(("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/docs"])))),
)]
async fn docs(Extension(document): Extension<Arc<Document>>) -> Response {
    page(document.page(|document| render(GUIDE, document).into_string()))
}

fn render(guide: &str, document: &Value) -> Markup {
    let (guide, headings) = render_guide(guide);
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "HTTP API of the ButterflyViT Gateway" }
                link rel="icon" href="/console/icon.svg" type="image/svg+xml";
                link rel="stylesheet" href="/console/console.css";
                link rel="stylesheet" href="/console/docs.css";
            }
            body class="docs" {
                a class="skip" href="#main" { "Skip to content" }
                header {
                    img src="/console/icon.svg" alt="" width="32" height="32";
                    h1 { "ButterflyViT Gateway" }
                    p { a href="/" { "Console" } " · " a href="/openapi.json" { "OpenAPI document" } }
                }
                main id="main" {
                    nav aria-label="Contents" { (contents(&headings, document)) }
                    div {
                        section { (guide) }
                        @for tag in list(&document["tags"]) { (chapter(tag, document)) }
                        section aria-labelledby="schemas" {
                            h2 id="schemas" { "Schemas" }
                            @for (name, schema) in members(&document["components"]["schemas"]) { (named_schema(name, schema)) }
                        }
                    }
                }
            }
        }
    }
}

fn contents(headings: &[(String, String)], document: &Value) -> Markup {
    html! {
        h2 { "Contents" }
        ul {
            @for (id, text) in headings { li { a href={ "#" (id) } { (text) } } }
            @for tag in list(&document["tags"]) {
                li {
                    a href={ "#reference-" (text(&tag["name"])) } { "Reference: " (text(&tag["name"])) }
                    ul {
                        @for (method, path, operation) in operations(document, text(&tag["name"])) {
                            li { a href={ "#" (text(&operation["operationId"])) } { code { (method) " " (path) } } }
                        }
                    }
                }
            }
            li { a href="#schemas" { "Schemas" } }
        }
    }
}

/// A chapter's operations: method, path and description.
fn operations<'a>(document: &'a Value, tag: &str) -> Vec<(String, &'a str, &'a Value)> {
    let of_path = |(path, item): (&'a String, &'a Value)| {
        members(item).map(move |(method, operation)| (method.to_uppercase(), path.as_str(), operation))
    };
    let all = members(&document["paths"]).flat_map(of_path);
    all.filter(|(.., operation)| list(&operation["tags"]).iter().any(|name| name == tag)).collect()
}

fn chapter(tag: &Value, document: &Value) -> Markup {
    let name = text(&tag["name"]);
    html! {
        section aria-labelledby={ "reference-" (name) } {
            h2 id={ "reference-" (name) } { "Reference: " (name) }
            p { (text(&tag["description"])) }
            @for (method, path, operation) in operations(document, name) { (operation_article(&method, path, operation)) }
        }
    }
}

fn operation_article(method: &str, path: &str, operation: &Value) -> Markup {
    let id = text(&operation["operationId"]);
    html! {
        article aria-labelledby=(id) {
            h3 id=(id) { code { (method) " " (path) } }
            p { (text(&operation["summary"])) @if !list(&operation["security"]).is_empty() { " Needs a key where keys are configured." } }
            (markdown(text(&operation["description"])))
            @for sample in list(&operation["x-codeSamples"]) { pre tabindex="0" { code { (text(&sample["source"])) } } }
            @let parameters = list(&operation["parameters"]);
            @if !parameters.is_empty() {
                h4 { "Parameters" }
                table {
                    thead { tr { th scope="col" { "Name" } th scope="col" { "In" } th scope="col" { "Type" } th scope="col" { "Meaning" } } }
                    tbody {
                        @for parameter in parameters {
                            tr {
                                th scope="row" { code { (text(&parameter["name"])) } }
                                td { (text(&parameter["in"])) }
                                td { (type_of(&parameter["schema"])) }
                                td { (inline_markdown(text(&parameter["description"]))) }
                            }
                        }
                    }
                }
            }
            @if let Some(body) = operation["requestBody"]["content"].as_object() {
                h4 { "Body" @if operation["requestBody"]["required"] == false { " (may be left out)" } }
                (contents_of(body))
            }
            @let (successes, failures): (Vec<_>, Vec<_>) =
                members(&operation["responses"]).partition(|(status, _)| status.starts_with('2'));
            h4 { "Answer" }
            @for (status, response) in successes {
                (answer(status, response))
                @if let Some(content) = response["content"].as_object() { (contents_of(content)) }
            }
            details {
                summary { "Errors:" @for (status, _) in &failures { " " (status) } }
                @for (status, response) in failures { (answer(status, response)) }
            }
        }
    }
}

fn answer(status: &str, response: &Value) -> Markup {
    html! {
        p { strong { (status) } @for line in text(&response["description"]).lines() { " " (inline_markdown(line)) } }
    }
}

/// Media types with what they hold.
fn contents_of(content: &Map<String, Value>) -> Markup {
    html! {
        ul class="forms" {
            @for (media_type, form) in content {
                li {
                    code { (media_type) } ": " (type_of(&form["schema"]))
                    @if let Some(properties) = form["schema"]["properties"].as_object() { (property_table(properties, &form["schema"])) }
                    @if !form["example"].is_null() {
                        pre tabindex="0" { code { (pretty(&form["example"])) } }
                    }
                }
            }
        }
    }
}

fn named_schema(name: &str, schema: &Value) -> Markup {
    html! {
        article aria-labelledby={ "schema-" (name) } {
            h3 id={ "schema-" (name) } { (name) }
            (markdown(text(&schema["description"])))
            @if schema["properties"].is_object() || schema["allOf"].is_array() {
                @for part in std::iter::once(schema).chain(list(&schema["allOf"])) {
                    @if let Some(reference) = part["$ref"].as_str() { p { "All of " (reference_link(reference)) ", and:" } }
                    @if let Some(properties) = part["properties"].as_object() { (property_table(properties, part)) }
                }
            } @else {
                p { (type_of(schema)) }
            }
        }
    }
}

fn property_table(properties: &Map<String, Value>, schema: &Value) -> Markup {
    let required = list(&schema["required"]);
    html! {
        table {
            thead { tr { th scope="col" { "Field" } th scope="col" { "Type" } th scope="col" { "Meaning" } } }
            tbody {
                @for (name, property) in properties {
                    tr {
                        th scope="row" { code { (name) } @if !required.iter().any(|field| field == name) { " (optional)" } }
                        td { (type_of(property)) }
                        td { (inline_markdown(text(&property["description"]))) }
                    }
                }
            }
        }
    }
}

/// A schema in a few words.
fn type_of(schema: &Value) -> Markup {
    let alternatives = ["oneOf", "anyOf"].into_iter().flat_map(|name| list(&schema[name])).collect::<Vec<_>>();
    html! {
        @if let Some(reference) = schema["$ref"].as_str() {
            (reference_link(reference))
        } @else if let Some(values) = schema["enum"].as_array() {
            "one of " @for (i, value) in values.iter().enumerate() { @if i > 0 { ", " } code { (plain(value)) } }
        } @else if !alternatives.is_empty() {
            @for (i, alternative) in alternatives.iter().enumerate() { @if i > 0 { " or " } (type_of(alternative)) }
        } @else if schema["type"] == "array" {
            "list" @if schema["items"].as_object().is_some_and(|items| !items.is_empty()) { " of " (type_of(&schema["items"])) }
        } @else if let Some(names) = schema["type"].as_array() {
            @for (i, name) in names.iter().enumerate() { @if i > 0 { " or " } (text(name)) }
        } @else if let Some(name) = schema["type"].as_str() {
            (name)
        } @else {
            "bytes"
        }
        @if !schema["minimum"].is_null() && schema["minimum"] != 0 { ", at least " (schema["minimum"]) }
        @if !schema["default"].is_null() { ", " (plain(&schema["default"])) " when left out" }
    }
}

fn reference_link(reference: &str) -> Markup {
    let name = reference.rsplit('/').next().unwrap_or(reference);
    html! { a href={ "#schema-" (name) } { (name) } }
}

fn pretty(value: &Value) -> String {
    format!("{value:#}")
}

/// A value as it is written in a sentence: strings without quotes.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn members(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn markdown(text: &str) -> Markup {
    let mut rendered = String::new();
    pulldown_cmark::html::push_html(&mut rendered, Parser::new(text));
    PreEscaped(rendered)
}

/// Markdown of one paragraph, without the paragraph.
fn inline_markdown(text: &str) -> Markup {
    let mut rendered = String::new();
    let inside = |event: &Event<'_>| !matches!(event, Event::Start(Tag::Paragraph) | Event::End(TagEnd::Paragraph));
    pulldown_cmark::html::push_html(&mut rendered, Parser::new(text).filter(inside));
    PreEscaped(rendered)
}

/// The guide, with its second-level headings as anchors: id and text of each. Its title stands on the page already.
fn render_guide(guide: &str) -> (Markup, Vec<(String, String)>) {
    let mut events: Vec<Event<'_>> = Parser::new_ext(guide, Options::ENABLE_TABLES).collect();
    let mut headings = Vec::new();
    for i in 0..events.len() {
        let title = match events.get(i + 1) {
            Some(Event::Text(title)) => title.to_string(),
            _ => continue,
        };
        if let Event::Start(Tag::Heading { id, .. }) = &mut events[i] {
            let anchor = format!("guide-{}", title.to_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "-"));
            *id = Some(CowStr::from(anchor.clone()));
            headings.push((anchor, title));
        }
    }
    let mut rendered = String::new();
    pulldown_cmark::html::push_html(&mut rendered, events.into_iter());
    // What scrolls must be within reach of the keyboard.
    (PreEscaped(rendered.replace("<pre>", "<pre tabindex=\"0\">")), headings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::LazyLock;

    static DOCUMENT: LazyLock<Value> =
        LazyLock::new(|| crate::http::openapi::describe(crate::http::api().get_openapi()));
    static PAGE: LazyLock<String> = LazyLock::new(|| render(GUIDE, &DOCUMENT).into_string());

    #[test]
    fn the_page_has_the_guide_every_operation_and_every_schema() {
        let document = &*DOCUMENT;
        for (_, item) in members(&document["paths"]) {
            for (_, operation) in members(item) {
                assert!(PAGE.contains(&format!("id=\"{}\"", text(&operation["operationId"]))), "{operation}");
            }
        }
        for (name, _) in members(&document["components"]["schemas"]) {
            assert!(PAGE.contains(&format!("id=\"schema-{name}\"")), "{name}");
        }
        assert!(PAGE.contains("id=\"guide-errors\""));
    }

    #[test]
    fn every_link_within_the_page_leads_somewhere_and_none_leads_away() {
        for link in PAGE.split("href=\"").skip(1).map(|rest| rest.split('"').next().unwrap()) {
            match link.strip_prefix('#') {
                Some(id) => assert!(PAGE.contains(&format!("id=\"{id}\"")), "{link}"),
                None => assert!(link.starts_with('/'), "{link}"),
            }
        }
        assert!(!PAGE.contains("<script") && !PAGE.contains(" style=") && !PAGE.contains("src=\"http"));
    }

    #[test]
    fn the_guide_names_every_code_beside_its_status() {
        for code in crate::http::error::ErrorCode::ALL {
            let row =
                GUIDE.lines().find(|line| line.starts_with('|') && line.contains(&format!("`{}`", code.as_str())));
            assert!(row.is_some_and(|row| row.contains(code.status().as_str())), "{code:?}: {row:?}");
        }
    }

    #[test]
    fn what_stands_in_the_document_is_text() {
        let document = serde_json::json!({
            "tags": [{ "name": "t", "description": "<b>" }],
            "paths": { "/<i>": { "get": { "operationId": "x", "tags": ["t"], "summary": "<script>" } } },
        });
        let page = render("# T\n", &document).into_string();
        assert!(!page.contains("<b>") && !page.contains("<i>") && !page.contains("<script"));
    }
}
