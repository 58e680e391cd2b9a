// What scrolls sideways, a wide table or code, can be reached and moved by the keyboard in every browser.
addEventListener("load", () => {
  const reach = new ResizeObserver((seen) => {
    for (const { target } of seen) {
      if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
      else target.removeAttribute("tabindex");
    }
  });
  const wide = ".md-typeset__scrollwrap, .md-typeset p:has(> img:only-child)";
  document.querySelectorAll(wide).forEach((part) => reach.observe(part));
});
