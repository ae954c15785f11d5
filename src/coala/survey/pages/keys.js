// A letter or number chooses an answer, Enter goes on. The page works without this file.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const choices = [...document.querySelectorAll("input[name=choice]")];
  if (event.key === "Enter" && !event.target.closest("a, button")) {
    event.preventDefault();
    choices[0].form.requestSubmit();
    return;
  }
  const key = event.key.toUpperCase();
  const found = choices.find((choice, place) => choice.value === key || String(place + 1) === key);
  if (found) {
    found.checked = true;
    found.focus();
  }
});
