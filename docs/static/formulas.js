// Draw every formula as MathML: the browser's own fonts do, so nothing else has to be shipped.
addEventListener("DOMContentLoaded", () => {
  for (const place of document.querySelectorAll(".formula"))
    katex.render(place.textContent, place, {displayMode: place.tagName === "DIV", output: "mathml", throwOnError: false});
});
