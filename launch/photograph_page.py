"""Takes the pictures of the web page in docs/, in Chromium, with the small cascade.

  pip install '.[serve]' playwright && python launch/photograph_page.py FOLDER

FOLDER/page_first.png: the row of first videos of a prompt. FOLDER/page_result.png: the video that grew out of one of
them. Chromium is the system's, or the one that `playwright install chromium` downloads.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys

PROMPT = "a yellow star moving right on a teal background"
PORT = 7869
MINUTES = 20  # for each of the two steps; two CPU cores need a few


def photograph(address: str, folder: pathlib.Path) -> None:
    """Types the prompt, picks the second video, and writes a picture after each of the two steps."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1100, "height": 760})
        page.set_default_timeout(MINUTES * 60_000)
        page.goto(address)
        page.get_by_label("Prompt").first.fill(PROMPT)
        page.click("#make")
        page.wait_for_selector("#first3 video")
        page.wait_for_timeout(1500)  # until the players show a frame
        page.screenshot(path=folder / "page_first.png")
        page.click("#pick1")
        page.wait_for_selector("#result video")
        page.locator("#result").scroll_into_view_if_needed()
        page.wait_for_timeout(1500)
        page.screenshot(path=folder / "page_result.png")
        browser.close()


def main() -> None:
    """Serves the page, and photographs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="where the pictures are written; they are replaced")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    command = ["-m", "ivideo.main", "--config=configs/cascade.py:demo", "--mode=serve", f"--port={PORT}"]
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as server:
        try:
            photograph(server.stdout.readline().strip(), folder)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
