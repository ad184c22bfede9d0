// The page in two languages. A key is the English text.
const zh = {
  Models: "模型", Resources: "资源", Routing: "路由", Playground: "试用",
  "No instance is registered yet. `infermesh up` starts a mesh; `infermesh llm --registry …` adds an instance.": "还没有实例注册。`infermesh up` 启动整个 mesh；`infermesh llm --registry …` 添加一个实例。",
  "live": "实时", "connecting…": "连接中…", "not connected": "未连接", "registry out of reach: last known instances": "注册中心不可达：显示最后已知的实例",
  "in flight": "处理中", "waiting": "等待", "requests": "请求", "gateway": "网关", "served by": "由以下实例提供", "aliases": "别名", "context": "上下文", "tokens": "tokens",
  "falls back to": "降级到", "variants": "按权重分配", "nobody serves it right now": "目前没有实例提供",
  "model": "模型", "device": "设备", "state": "状态", "running": "运行", "KV cache": "KV 缓存", "speed": "速度", "weight": "权重", "tier": "层级", "address": "地址", "zone": "区域", "version": "版本", "engine": "引擎",
  "group": "分组", "replicas": "副本", "present": "现有", "wanted": "期望", "bounds": "范围", "in use": "使用中", "Scaled groups": "伸缩分组", "no opinion yet": "尚无结论", "decode": "解码", "slots": "并发槽", "kv": "KV 缓存",
  "prefill": "预填充", "decode step": "解码步", "source": "来源", "rejected": "被拒绝", "health history": "健康历史", "now": "现在", "ago": "前", "hosts": "主机",
  "time": "时间", "request": "请求", "instance": "实例", "why": "原因", "outcome": "结果", "waited": "等待", "first token": "首 token", "duration": "耗时", "prompt": "提示词", "cached": "缓存命中", "answer": "回答", "attempts": "尝试",
  "Every request that ends appears here. Send one from the playground.": "每个结束的请求都会出现在这里。可以在“试用”页发送一个。",
  "Choose a request to see why it went where it went.": "选择一个请求，查看它为什么去了那里。",
  "candidates": "候选", "cost": "代价", "terms, seconds": "各项，秒", "rejected instances": "被排除的实例", "predicted first token": "预测首 token", "attempt": "尝试", "no candidate": "没有候选", "close": "关闭", "only mine": "只看失败", "failures only": "只看失败", "pause": "暂停", "go on": "继续", "filter": "过滤",
  "Where would it go now?": "现在会去哪里？", "explain": "解释", "prompt tokens": "提示词 tokens", "answer tokens": "回答 tokens",
  "Chat": "对话", "Similarity": "相似度", "Rerank": "重排", "system": "系统提示", "message": "消息", "send": "发送", "stop": "停止", "clear": "清空", "temperature": "温度", "longest answer": "最长回答", "one text a line": "每行一个文本", "compare": "比较", "query": "查询", "documents, one a line": "文档，每行一个", "rank": "排序", "score": "得分",
  "Ctrl+Enter sends": "Ctrl+Enter 发送", "tokens/s": "tokens/秒", "degraded from": "降级自", "stopped": "已停止", "no model of this kind is served": "没有这类模型", "on": "于", "of which cached": "其中缓存",
  "This gateway wants an API key": "此网关需要 API key", "API key": "API key", "enter": "进入", "It stays in this tab only.": "只保存在当前标签页。", "other key": "更换 key",
  "wait": "排队", "line": "队列", "room": "空位", "preempt": "抢占", "reserve": "预留", "decode": "解码", "gone": "已离开",
};
const LANG = "infermesh.lang";
export const language = () => localStorage.getItem(LANG) || (navigator.language.startsWith("zh") ? "zh" : "en");
export const speak = (lang) => { localStorage.setItem(LANG, lang); document.documentElement.lang = lang === "zh" ? "zh-CN" : "en"; };
export const t = (text) => (language() === "zh" && zh[text]) || text;

export const seconds = (s) => s === 0 || s == null ? "–" : s < 1 ? `${Math.round(s * 1000)} ms` : `${s < 10 ? s.toFixed(2) : s.toFixed(1)} s`;
export const count = (n) => n == null ? "–" : n >= 1e6 ? `${(n / 1e6).toFixed(1)}M` : n >= 1e4 ? `${Math.round(n / 1e3)}k` : String(Math.round(n));
export const percent = (x) => x == null ? "–" : `${Math.round(x * 100)} %`;
export const clock = (at) => new Date(at * 1000).toLocaleTimeString(language() === "zh" ? "zh-CN" : "en-GB");
export const ago = (from, now) => { const s = Math.max(0, now - from); return s < 60 ? `${Math.round(s)} s` : s < 3600 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`; };
