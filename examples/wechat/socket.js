/** The socket of a WeChat mini-program, in the shape that quotepush.js takes: `connect(url, { WebSocket: WechatSocket })`. */
export class WechatSocket {
  #task;

  constructor(url, protocols) {
    this.#task = wx.connectSocket({ url, protocols });
    this.#task.onMessage(({ data }) => this.onmessage?.({ data }));
    this.#task.onClose(({ code, reason }) => this.onclose?.({ code, reason }));
    this.#task.onError(() => this.onerror?.());
  }

  send(data) {
    this.#task.send({ data });
  }

  close() {
    this.#task.close({});
  }
}
