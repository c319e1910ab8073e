// Lets the search of the site run from files, where browsers start no workers: what would be a worker is a script in a hidden frame.
// The theme's search knows such a frame by the name IFrameWorker.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.frame = frame.contentWindow;
      this.frame.document.write("<html><body></body></html>");
      this.frame.document.close();
      this.frame.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      this.frame.importScripts = async (...urls) => { for (const each of urls) await this.load(each); };
      this.ready = this.load(String(url));
    }
    load(url) {
      return new Promise((resolve, reject) => {
        const script = Object.assign(this.frame.document.createElement("script"), { src: url, onload: resolve, onerror: reject });
        this.frame.document.body.append(script);
      });
    }
    postMessage(data) {
      this.ready.then(() => this.frame.dispatchEvent(new this.frame.MessageEvent("message", { data })));
    }
    terminate() {}
  };
  window.Worker = window.IFrameWorker;
}
